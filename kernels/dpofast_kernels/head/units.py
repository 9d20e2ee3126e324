"""How sequences are cut into chunks: a chunk is a run of whole units.

A unit is a run of sequences that no pair crosses, such as the two answers of a pair. The losses of
a unit's pairs are known once its own rows are scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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


def join_units(units: Sequence[Chunk], max_rows: int) -> Iterator[Chunk]:
    """Join neighbouring units to chunks of at most `max_rows` rows.

    A unit with more rows than that is a chunk of its own.
    """
    joined: Chunk | None = None
    for unit in units:
        if joined is None:
            joined = unit
        elif unit.end - joined.start <= max_rows:
            joined = Chunk(
                *(joined.first, unit.last),
                *(joined.first_pair, unit.last_pair),
                *(joined.start, unit.end),
            )
        else:
            yield joined
            joined = unit
    if joined is not None:
        yield joined
