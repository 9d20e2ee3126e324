"""How sequences are cut into chunks: a chunk is a run of whole units.

A unit is a run of sequences that no pair crosses, such as the two answers of a pair. The losses of
a unit's pairs are known once its own rows are scored.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from dpofast_kernels.head.workspace import ChunkLimits

PairIndices = Sequence[tuple[int, int]]  # chosen and rejected sequence of each pair


@dataclass(frozen=True)
class Chunk:
    """Sequences first:last, of which pairs first_pair:last_pair are made; rows start:end."""

    first: int
    last: int
    first_pair: int
    last_pair: int
    start: int
    end: int

    @property
    def num_rows(self) -> int:
        return self.end - self.start

    @property
    def num_sequences(self) -> int:
        return self.last - self.first

    @property
    def num_pairs(self) -> int:
        return self.last_pair - self.first_pair


def cut_units(limits: Sequence[int], pairs: PairIndices | None = None) -> list[Chunk]:
    """Cut sequences into units, as small as the pairs allow.

    Args:
        limits: [S+1], bounds of the sequences.
        pairs: sequences of each pair; None for (0, 1), (2, 3), ... A sequence may be in several
            pairs or in none.

    Raises:
        ValueError: the pairs of a unit aren't neighbours, or units don't come in the order of their
            sequences.
    """
    num_sequences = len(limits) - 1
    if pairs is None:
        return [
            Chunk(first, first + 2, first // 2, first // 2 + 1, limits[first], limits[first + 2])
            for first in range(0, num_sequences, 2)
        ]
    furthest = list(range(num_sequences))  # the last sequence that a pair joins to this one
    for pair in pairs:
        low, high = sorted(pair)
        furthest[low] = max(furthest[low], high)
    units, first, reach, taken = [], 0, 0, 0
    for sequence in range(num_sequences):
        reach = max(reach, furthest[sequence])
        if reach > sequence:
            continue
        last, first_pair = sequence + 1, taken
        while taken < len(pairs) and first <= min(pairs[taken]) and max(pairs[taken]) < last:
            taken += 1
        units.append(Chunk(first, last, first_pair, taken, limits[first], limits[last]))
        first = last
    if taken < len(pairs):
        raise ValueError(
            f"pairs[{taken}] is {list(pairs[taken])}, after a pair of later sequences; expected "
            "the pairs in the order of their sequences."
        )
    return units


def join_units(units: Sequence[Chunk], limits: ChunkLimits) -> list[Chunk]:
    """Join neighbouring units to chunks.

    Their number comes closest to the wanted number of rows, and they are cut as evenly as the units
    allow. A chunk can have more rows than wanted, but never more than `limits.most`. A unit with
    more rows than that is a chunk of its own.
    """
    chunks: list[Chunk] = []
    run: list[Chunk] = []
    for unit in units:
        if unit.num_rows > limits.most:
            chunks += [*_even_chunks(run, limits), unit]
            run = []
        else:
            run.append(unit)
    return chunks + _even_chunks(run, limits)


def _joined(units: Sequence[Chunk]) -> Chunk:
    first, last = units[0], units[-1]
    return Chunk(
        *(first.first, last.last),
        *(first.first_pair, last.last_pair),
        *(first.start, last.end),
    )


def _even_chunks(units: Sequence[Chunk], limits: ChunkLimits) -> list[Chunk]:
    """Chunks of neighbouring units, none of which has more than `limits.most` rows."""
    if not units:
        return []
    total = units[-1].end - units[0].start
    count = max(-(-total // limits.most), round(total / limits.wanted))
    largest = max(unit.num_rows for unit in units)
    while True:
        # The least number of rows with which `count` chunks suffice.
        sizes = range(largest, total + 1)
        size = sizes[bisect_left(sizes, -count, key=lambda rows: -len(_filled(units, rows)))]
        if size <= limits.most:
            return [_joined(run) for run in _filled(units, size)]
        count += 1


def _filled(units: Sequence[Chunk], max_rows: int) -> list[Sequence[Chunk]]:
    """Runs of neighbouring units, each as long as `max_rows` allows."""
    runs, first = [], 0
    for index, unit in enumerate(units):
        if unit.end - units[first].start > max_rows:
            runs.append(units[first:index])
            first = index
    return [*runs, units[first:]]
