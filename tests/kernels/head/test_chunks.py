"""Chunks cover all rows once, within the limit, and never cut a pair."""

from __future__ import annotations

from itertools import accumulate

import torch
from hypothesis import given
from hypothesis import strategies as st

from dpofast_kernels.head.chunks import max_chunk_rows, pair_chunks, row_chunks


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


def test_rows_of_a_workspace():
    """160 MiB on a CPU; rows are aligned to 128 bytes, and one always fits."""
    weight = torch.zeros(2**20 - 3, 0)
    assert max_chunk_rows(weight, torch.float64, None) == 20
    assert max_chunk_rows(weight, torch.float64, 2**26) == 8
    assert max_chunk_rows(weight, torch.float64, 1) == 1
    assert max_chunk_rows(weight, None, 1) > 1000


def test_rows_of_a_workspace_on_a_device():
    """1 GB, where a row of 152,064 fp32 numbers has 608,256 bytes."""
    weight = torch.empty(152_064, 0, device="meta")
    assert max_chunk_rows(weight, torch.float32, None) == 1644
    assert max_chunk_rows(weight, torch.bfloat16, None) == 3288
