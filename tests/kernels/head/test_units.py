"""Units are as small as the pairs allow, and chunks are made of whole units."""

from __future__ import annotations

from itertools import accumulate, combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpofast_kernels.head.units import Chunk, cut_units, join_units
from dpofast_kernels.head.workspace import ChunkLimits

LENGTHS = st.lists(st.integers(1, 30), max_size=12)


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30))), st.integers(1, 100))
def test_chunks_of_pairs(pairs, max_rows):
    limits = list(accumulate((length for pair in pairs for length in pair), initial=0))
    chunks = join_units(cut_units(limits), ChunkLimits(max_rows, max_rows, max_rows))
    covered = [pair for chunk in chunks for pair in range(chunk.first_pair, chunk.last_pair)]
    assert covered == list(range(len(pairs)))
    for chunk in chunks:
        assert (chunk.first, chunk.last) == (2 * chunk.first_pair, 2 * chunk.last_pair)
        assert (chunk.start, chunk.end) == (limits[chunk.first], limits[chunk.last])
        assert chunk.num_rows <= max_rows or chunk.num_pairs == 1


@given(LENGTHS, st.data(), st.integers(1, 100))
def test_chunks_of_any_pairs(lengths, data, max_rows):
    """Pairs between sequences that are a few apart, in the order of their units."""
    limits = list(accumulate(lengths, initial=0))
    drawn = data.draw(
        st.lists(
            st.tuples(st.integers(0, len(lengths) - 1), st.integers(0, len(lengths) - 1)).filter(
                lambda pair: 0 < abs(pair[0] - pair[1]) <= 3
            )
            if len(lengths) > 1
            else st.nothing()
        )
    )
    pairs = sorted(drawn, key=lambda pair: unit_of(pair, drawn))
    units = cut_units(limits, pairs)
    assert [unit.first for unit in units] == [0, *(unit.last for unit in units[:-1])][: len(units)]
    assert [unit.first_pair for unit in units] == (
        [0, *(unit.last_pair for unit in units[:-1])][: len(units)]
    )
    for unit in units:
        inside = set(range(unit.first, unit.last))
        assert all(set(pair) <= inside for pair in pairs[unit.first_pair : unit.last_pair])
        # A smaller unit would cut a pair: each inner boundary is crossed by one.
        for boundary in range(unit.first + 1, unit.last):
            assert any(min(pair) < boundary <= max(pair) for pair in pairs)
    chunks = join_units(units, ChunkLimits(max_rows, max_rows, max_rows))
    assert sum(chunk.num_sequences for chunk in chunks) == len(lengths)
    assert sum(chunk.num_pairs for chunk in chunks) == len(pairs)
    for chunk in chunks:
        assert (chunk.start, chunk.end) == (limits[chunk.first], limits[chunk.last])
        assert chunk.num_rows <= max_rows or chunk in units


def unit_of(pair, pairs):
    """The first sequence of the pair's unit, found by joining pairs that overlap."""
    low, high = min(pair), max(pair)
    while True:
        over = [other for other in pairs if min(other) < high and max(other) > low]
        bounds = (min([low, *map(min, over)]), max([high, *map(max, over)]))
        if bounds == (low, high):
            return low
        low, high = bounds


@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(1, 60), st.integers(0, 40))
def test_chunks_are_as_even_as_the_units_allow(rows, wanted, more):
    """Compared with every way to cut the same units into the same number of chunks."""
    bounds = list(accumulate((n for each in rows for n in (each, 1)), initial=0))
    units = cut_units(bounds)
    most = max(wanted + more, max(unit.num_rows for unit in units))
    chunks = join_units(units, ChunkLimits(wanted, most, most))
    assert (chunks[0].start, chunks[-1].end) == (0, bounds[-1])

    def largest(cuts):
        ends = [*cuts, len(units)]
        starts = [0, *cuts]
        return max(units[b - 1].end - units[a].start for a, b in zip(starts, ends, strict=True))

    def best(count):
        return min(largest(cuts) for cuts in combinations(range(1, len(units)), count - 1))

    assert max(chunk.num_rows for chunk in chunks) == best(len(chunks)) <= most
    asked = min(max(round(bounds[-1] / wanted), -(-bounds[-1] // most)), len(units))
    # One chunk more only if fewer don't fit; one less only if the same size needs fewer.
    if len(chunks) > asked:
        assert best(len(chunks) - 1) > most
    elif len(chunks) < asked:
        assert best(asked) == best(len(chunks))


def test_units_of_named_pairs():
    limits = [0, 1, 3, 6, 10, 15, 21]
    # Sequence 0 is in no pair, 1 to 3 are a group of three pairs, 4 and 5 a pair.
    pairs = [(1, 2), (3, 1), (2, 3), (5, 4)]
    assert cut_units(limits, pairs) == [
        Chunk(0, 1, 0, 0, 0, 1),
        Chunk(1, 4, 0, 3, 1, 10),
        Chunk(4, 6, 3, 4, 10, 21),
    ]


def test_pairs_out_of_order_are_refused():
    with pytest.raises(ValueError, match=r"pairs\[1\] is \[0, 1\], after a pair of later"):
        cut_units([0, 1, 2, 3, 4], [(2, 3), (0, 1)])
