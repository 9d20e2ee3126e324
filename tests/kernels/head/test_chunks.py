"""Chunks cover all rows once, within the limit, and never cut a pair."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpofast_kernels import linear_pair_loss, make_loss
from dpofast_kernels.head import chunks as chunking
from dpofast_kernels.head.chunks import kept_workspace, max_chunk_rows, pair_chunks, row_chunks


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_workspace_is_kept_for_the_next_call(dtype):
    weight = torch.zeros(1000, 0)
    first = kept_workspace(weight, 40, dtype)
    assert (first.shape, first.dtype) == ((40, 1000), dtype)
    assert first.stride(0) * dtype.itemsize % 128 == 0
    again = kept_workspace(weight, 30, dtype)
    assert again.data_ptr() == first.data_ptr()
    assert again.shape == (30, 1000)
    larger = kept_workspace(weight, 50, dtype)
    assert larger.shape == (50, 1000)
    assert kept_workspace(weight, 50, dtype).data_ptr() == larger.data_ptr()


def test_threads_have_workspaces_of_their_own():
    weight = torch.zeros(1000, 0)
    barrier = threading.Barrier(2)

    def fill(number):
        mine = kept_workspace(weight, 10, torch.float32).fill_(number)
        barrier.wait()
        return bool((mine == number).all())

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(fill, (1.0, 2.0))) == [True, True]


def test_a_workspace_larger_than_the_limit_is_not_kept():
    weight = torch.empty(2**20, 0)
    own = kept_workspace(weight, 41, torch.float32)  # of 164 MiB, nothing is written to it
    assert own.shape == (41, 2**20)
    assert kept_workspace(weight, 1, torch.float32).data_ptr() != own.data_ptr()


def test_a_workspace_made_in_inference_mode_serves_training():
    weight = torch.zeros(1000, 0)
    chunking._kept.__dict__.clear()
    with torch.inference_mode():
        kept_workspace(weight, 10, torch.float32).fill_(1.0)
    assert not kept_workspace(weight, 10, torch.float32).fill_(2.0).is_inference()


def test_what_a_workspace_held_before_plays_no_part():
    torch.manual_seed(0)
    hidden_states = torch.randn(12, 8, requires_grad=True)
    weight = torch.randn(50, 8, requires_grad=True)
    labels, bounds = torch.randint(0, 50, (12,)), torch.tensor([0, 3, 6, 9, 12])

    def run():
        ref_logps = torch.zeros(4, dtype=torch.float64)
        loss = linear_pair_loss(
            hidden_states, weight, labels, bounds, ref_logps, make_loss("sigmoid", beta=0.1)
        ).loss
        return [loss, *torch.autograd.grad(loss, [hidden_states, weight])]

    first = run()
    chunking._kept.memory.view(torch.float32).fill_(float("nan"))
    for got, wanted in zip(run(), first, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
