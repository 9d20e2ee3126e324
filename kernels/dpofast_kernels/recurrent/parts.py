"""The parts of a packed row, as layers that pass something on from token to token see them.

A row is a sequence of groups, and a group is a prefix and the tails that continue it:

    prefix | tail_1 | ... | tail_K | prefix | tail_1 | ...

Each prefix and each tail is a part. A prefix starts from nothing, and a tail starts from what its
prefix has left: a state, or the last inputs of a convolution. Tails without tokens aren't parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# For each group of a row, the length of its prefix and the lengths of its tails.
Groups = Sequence[tuple[int, Sequence[int]]]


@dataclass(frozen=True)
class RowParts:
    """The parts of a packed row, in the row's order.

    Attributes:
        lengths: tokens of each part, at least 1.
        prefixes: the part that each part continues; None for a prefix.
    """

    lengths: tuple[int, ...]
    prefixes: tuple[int | None, ...]

    @classmethod
    def of(cls, groups: Groups) -> RowParts:
        """The parts of a row.

        Args:
            groups: length of the prefix (at least 1) and lengths of the tails (at least 0) of each
                group, in the row's order.
        """
        lengths: list[int] = []
        prefixes: list[int | None] = []
        for prefix, tails in groups:
            number = len(lengths)
            kept = [length for length in tails if length]
            lengths += [prefix, *kept]
            prefixes += [None, *[number] * len(kept)]
        return cls(tuple(lengths), tuple(prefixes))

    def continued(self) -> frozenset[int]:
        """The prefixes that a tail continues."""
        return frozenset(prefix for prefix in self.prefixes if prefix is not None)
