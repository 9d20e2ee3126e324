"""How sequences become a micro-batch: packed into one row, or padded into one row each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dpofast.data.packing.batch import PackedPairs, TokenIds, collate_padded, padded_shape
from dpofast.data.packing.packed import collate_packed, packed_tokens

# What can be asked for; "auto" is "shared" wherever that is right.
LAYOUTS = ("auto", "shared", "unshared", "padded")


@dataclass(frozen=True)
class Layout:
    """How sequences become a micro-batch.

    Attributes:
        name: "shared", "unshared" or "padded".
        pad_token_id: fills the ends of padded rows.
    """

    name: str
    pad_token_id: int = 0

    @property
    def is_packed(self) -> bool:
        return self.name != "padded"

    @property
    def shares(self) -> bool:
        return self.name == "shared"

    def collate(
        self,
        sequences: Sequence[tuple[TokenIds, TokenIds]],
        ref_logps: Sequence[float] | None = None,
        by_prompt: bool = False,
    ) -> PackedPairs:
        """Lay out (prompt ids, answer ids) sequences: those of pairs, or `by_prompt` any."""
        if self.is_packed:
            return collate_packed(sequences, ref_logps, self.shares, by_prompt)
        return collate_padded(sequences, ref_logps, self.pad_token_id)

    def num_tokens(
        self, sequences: Sequence[tuple[TokenIds, TokenIds]], by_prompt: bool = False
    ) -> int:
        """Positions of the micro-batch that `collate` makes of these, padding included."""
        if self.is_packed:
            return packed_tokens(sequences, self.shares, by_prompt)
        rows, width = padded_shape(sequences)
        return rows * width
