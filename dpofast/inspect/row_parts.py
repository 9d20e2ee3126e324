"""The parts of a packed row: prefixes that sequences share, and what follows them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from dpofast.data.packing.batch import PackedPairs

PREFIX = "prefix"
SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class RowPart:
    """A stretch of a packed row: a prefix that sequences share, or the rest of a sequence.

    In the layout `unshared`, nothing is shared and a part is a whole sequence.

    Attributes:
        unit: number of the group that it is printed with, from 0; see `RowUnit`.
        name: "prefix", "chosen", "rejected", or "answer 1", "answer 2", ... in a group of several
            pairs.
        start: index of the part's first token in the row.
        length: number of tokens; 0 for a sequence that ends with the prefix.
        position: index of the part's first token in its sequence.
        scored: where in the row the hidden states are that predict the answer's tokens, as runs
            (first index, last index); empty for a prefix.
    """

    unit: int
    name: str
    start: int
    length: int
    position: int
    scored: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class RowUnit:
    """Pairs of a row that have sequences or a prefix in common.

    Attributes:
        pairs: the pairs in the row, from 0.
        parts: their parts, in the row's order.
        names: names of the chosen and of the rejected answer of each pair.
    """

    pairs: list[int]
    parts: list[RowPart]
    names: list[tuple[str, str]]


def row_units(batch: PackedPairs) -> list[RowUnit]:
    """The parts of a packed row of pairs, in the row's order, with the pairs that they belong to.

    A single pair has the parts prefix, chosen, rejected in the layout `shared`, and chosen,
    rejected in the layout `unshared`. A group of several pairs has a prefix and a part for each
    distinct answer.
    """
    sequences = batch.of_pairs(torch.arange(len(batch.bounds) - 1)).view(-1, 2).tolist()
    groups = _groups_of_sequences(batch)
    units: list[list[int]] = []
    last: set[int] = set()
    for pair, both in enumerate(sequences):
        found = {groups[sequence] for sequence in both}
        if units and found & last:
            units[-1].append(pair)
        else:
            units.append([pair])
        last = found
    return list(_described(batch, units, sequences, groups))


def _groups_of_sequences(batch: PackedPairs) -> list[int]:
    """The group of each sequence: its first scored position is in its group's prefix or tail."""
    assert batch.shared_layout is not None
    firsts = batch.scored_positions[batch.bounds[:-1]]
    found: list[int] = batch.shared_layout.group_ids[firsts].tolist()
    return found


def _described(
    batch: PackedPairs, units: list[list[int]], sequences: list[list[int]], groups: list[int]
) -> Iterator[RowUnit]:
    sizes = Counter(groups)  # sequences of each group
    lengths = _part_lengths(batch, max(sizes.values()))
    start = 0
    for number, pairs in enumerate(units):
        members = sorted({sequence for pair in pairs for sequence in sequences[pair]})
        names = dict(zip(members, _names(len(pairs), members, sequences[pairs[0]]), strict=True))
        parts: list[RowPart] = []
        for group, together in groupby(members, key=groups.__getitem__):
            prefix, *tails = lengths[group]
            if sizes[group] > 1:
                parts.append(RowPart(number, PREFIX, start, prefix, 0))
                start += prefix
                prefixes = [prefix] * len(tails)
            else:  # a sequence by itself is all prefix
                tails, prefixes = [prefix], [0]
            for sequence, length, position in zip(together, tails, prefixes, strict=False):
                scored = _scored_runs(batch, sequence)
                parts.append(RowPart(number, names[sequence], start, length, position, scored))
                start += length
        of_pairs = [sequences[pair] for pair in pairs]
        yield RowUnit(pairs, parts, [(names[one], names[other]) for one, other in of_pairs])


def _part_lengths(batch: PackedPairs, most: int) -> list[list[int]]:
    """Tokens of each group's prefix and of its tails.

    Args:
        batch: a packed row.
        most: most sequences of a group.
    """
    layout = batch.shared_layout
    assert layout is not None
    num_groups = int(layout.group_ids[-1]) + 1
    part_ids = layout.group_ids * (most + 1) + layout.tail_ids  # [T]
    counts = torch.bincount(part_ids, minlength=num_groups * (most + 1))
    lengths: list[list[int]] = counts.view(num_groups, most + 1).tolist()
    return lengths


def _names(num_pairs: int, members: list[int], first_pair: list[int]) -> list[str]:
    if num_pairs == 1:
        return [SIDES[first_pair.index(sequence)] for sequence in members]
    return [f"answer {number + 1}" for number in range(len(members))]


def _scored_runs(batch: PackedPairs, sequence: int) -> tuple[tuple[int, int], ...]:
    first, end = batch.bounds[sequence : sequence + 2].tolist()
    return tuple(_runs(batch.scored_positions[first:end]))


def _runs(
    positions: Tensor,  # [n]
) -> Iterator[tuple[int, int]]:
    """First and last number of each run of consecutive numbers."""
    breaks = (positions.diff() != 1).nonzero()[:, 0].tolist()
    firsts, lasts = [0, *(index + 1 for index in breaks)], [*breaks, len(positions) - 1]
    return ((int(positions[i]), int(positions[j])) for i, j in zip(firsts, lasts, strict=True))
