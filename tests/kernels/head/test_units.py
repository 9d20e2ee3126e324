"""Units are as small as the pairs allow, and chunks are made of whole units."""

from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpofast_kernels.head.units import Chunk, cut_units, join_units

LENGTHS = st.lists(st.integers(1, 30), max_size=12)


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30))), st.integers(1, 100))
def test_chunks_of_pairs(pairs, max_rows):
    limits = list(accumulate((length for pair in pairs for length in pair), initial=0))
    chunks = list(join_units(cut_units(limits), max_rows))
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
    chunks = list(join_units(units, max_rows))
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
