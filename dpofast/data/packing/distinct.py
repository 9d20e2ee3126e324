"""The distinct sequences of a micro-batch: an answer that several pairs have runs once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpofast.data.packing.prompt_groups import PromptGroups


@dataclass(frozen=True)
class DistinctSequences:
    """The sequences that a micro-batch runs, and the pairs that they make.

    Slot 2p is the chosen answer of pair p of the micro-batch, slot 2p + 1 the rejected one.

    Attributes:
        pairs: the pairs, counted in the dataset, in the order of the micro-batch. Pairs of a group
            are neighbours, and so are those that an answer links.
        slots: [S] a slot in which each sequence stands.
        sequences: [2P] the sequence of each slot.
        group_sizes: sequences of each group that shares a prefix.
        groups: [P] the group of each pair.
    """

    pairs: list[int]
    slots: list[int]
    sequences: list[int]
    group_sizes: list[int]
    groups: list[int]

    @classmethod
    def of(
        cls,
        parts: Sequence[list[int]],
        groups: PromptGroups | None,
    ) -> DistinctSequences:
        """Find the distinct sequences of some groups of pairs.

        Args:
            parts: the pairs of each group of a micro-batch, counted in the dataset.
            groups: prompts and answers of the dataset; None to run both sequences of each pair,
                which is a group of its own.
        """
        found = cls([], [], [], [], [])
        for part in parts:
            found._add(part, None if groups is None else groups.answers[part])
        return found

    def _add(
        self,
        part: list[int],
        answers: np.ndarray | None,  # [pairs of the part, 2]
    ) -> None:
        known: dict[int, int] = {}  # answer -> its sequence
        start = len(self.slots)
        for index in range(len(part)):
            for side in (0, 1):
                sequence = len(self.slots)
                # A pair needs two sequences, even if its answers are the same.
                if answers is not None and (side == 0 or answers[index, 0] != answers[index, 1]):
                    sequence = known.setdefault(int(answers[index, side]), sequence)
                if sequence == len(self.slots):
                    self.slots.append(len(self.sequences))
                self.sequences.append(sequence)
        self.pairs.extend(part)
        self.groups.extend([len(self.group_sizes)] * len(part))
        self.group_sizes.append(len(self.slots) - start)

    @property
    def is_plain(self) -> bool:
        """Whether the sequences are chosen_0, rejected_0, chosen_1, ..."""
        return len(self.slots) == len(self.sequences)

    @property
    def counts(self) -> list[int]:
        """[S]: in how many slots each sequence stands."""
        counted: list[int] = np.bincount(self.sequences, minlength=len(self.slots)).tolist()
        return counted

    @property
    def first_of_groups(self) -> list[int]:
        """The first sequence of each group."""
        sizes = np.array(self.group_sizes, np.int64)
        starts: list[int] = (sizes.cumsum() - sizes).tolist()
        return starts
