"""Chunks cover all rows once, within the limit, and never cut a pair."""

from __future__ import annotations

from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from dpofast_kernels.head.workspace import pair_chunks, row_chunks


@given(st.integers(0, 50), st.integers(0, 200), st.integers(1, 60))
def test_row_chunks(start, num_rows, max_rows):
    chunks = list(row_chunks(start, start + num_rows, max_rows))
    covered = [row for chunk in chunks for row in range(chunk.start, chunk.stop)]
    assert covered == list(range(start, start + num_rows))
    assert len(chunks) == -(-num_rows // max_rows)
    assert all(chunk.stop - chunk.start <= max_rows for chunk in chunks)


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30))), st.integers(1, 100))
def test_pair_chunks(pairs, max_rows):
    limits = list(accumulate((length for pair in pairs for length in pair), initial=0))
    chunks = list(pair_chunks(limits, max_rows))
    covered = [pair for chunk in chunks for pair in range(chunk.first, chunk.last)]
    assert covered == list(range(len(pairs)))
    for chunk in chunks:
        assert (chunk.start, chunk.end) == (limits[2 * chunk.first], limits[2 * chunk.last])
        assert chunk.end - chunk.start <= max_rows or chunk.last == chunk.first + 1
