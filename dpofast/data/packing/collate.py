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
        merges: an answer that several pairs of a micro-batch have runs once; not in the layout
            "unshared", in which each sequence of each pair is by itself. It would be wrong where
            two runs of a sequence differ at random.
    """

    name: str
    pad_token_id: int = 0
    merges: bool = True

    @property
    def is_packed(self) -> bool:
        return self.name != "padded"

    @property
    def shares(self) -> bool:
        return self.name == "shared"

    @property
    def runs_answers_once(self) -> bool:
        return self.merges and self.name != "unshared"

    def collate(
        self,
        sequences: Sequence[PromptAnswer],
        ref_logps: Sequence[float] | None = None,
        group_sizes: Sequence[int] | None = None,
        counts: Sequence[int] | None = None,
        scored_prompts: Sequence[int] = (),
    ) -> PackedPairs:
        """Lay out one micro-batch, each of whose sequences runs once.

        Args:
            sequences: (prompt ids, answer ids). They are the chosen and the rejected sequence of
                each pair in turn, unless `group_sizes` are given.
            ref_logps: one summed reference log-prob per sequence, in nats.
            group_sizes: numbers of consecutive sequences that have the same prompt, and may share
                it; see `runs_of_prompts`.
            counts: how often the pairs have each sequence; None for once.
            scored_prompts: sequences whose prompts are scored, too.
        """
        if self.is_packed:
            return collate_packed(
                *(sequences, ref_logps, self.shares, group_sizes, counts, scored_prompts)
            )
        return collate_padded(sequences, ref_logps, self.pad_token_id, counts, scored_prompts)

    def num_tokens(
        self, sequences: Sequence[PromptAnswer], group_sizes: Sequence[int] | None = None
    ) -> int:
        """Positions in the micro-batch that `collate` makes of `sequences`, padding included."""
        if self.is_packed:
            return packed_tokens(sequences, self.shares, group_sizes)
        rows, width = padded_shape(sequences)
        return rows * width
