"""The layouts a run can have: sequences packed into one row, or padded in one row each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dpofast.data.packing.batch import PackedPairs, PromptAnswer
from dpofast.data.packing.packed_row import collate_packed, packed_tokens
from dpofast.data.packing.padded_rows import collate_padded, padded_shape

# Values of the option `layout`. "auto" becomes "shared" if the model allows it, else "padded".
LAYOUTS = ("auto", "shared", "unshared", "padded")


@dataclass(frozen=True)
class Layout:
    """The way a run turns sequences into micro-batches.

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
        sequences: Sequence[PromptAnswer],
        ref_logps: Sequence[float] | None = None,
        by_prompt: bool = False,
        scores_prompts: bool = False,
    ) -> PackedPairs:
        """Lay out one micro-batch.

        Args:
            sequences: (prompt ids, answer ids). They are the chosen and the rejected sequence of
                each pair in turn, unless `by_prompt` is set.
            ref_logps: one summed reference log-prob per sequence, in nats.
            by_prompt: the sequences aren't pairs; consecutive ones may share their prompt.
            scores_prompts: score the prompt of each pair, too.
        """
        if self.is_packed:
            return collate_packed(sequences, ref_logps, self.shares, by_prompt, scores_prompts)
        return collate_padded(sequences, ref_logps, self.pad_token_id, scores_prompts)

    def num_tokens(self, sequences: Sequence[PromptAnswer], by_prompt: bool = False) -> int:
        """Positions in the micro-batch that `collate` makes of `sequences`, padding included."""
        if self.is_packed:
            return packed_tokens(sequences, self.shares, by_prompt)
        rows, width = padded_shape(sequences)
        return rows * width
