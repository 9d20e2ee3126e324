"""Chunks cover all rows. A workspace keeps to its limit and shows no old data."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpofast_kernels import HeadOptions, linear_logps, linear_pair_loss, make_loss
from dpofast_kernels.head import chunked
from dpofast_kernels.head import workspace as workspaces
from dpofast_kernels.head.workspace import Workspace, max_chunk_rows, row_chunks

DEFAULTS = HeadOptions()


@given(st.integers(0, 50), st.integers(0, 200), st.integers(1, 60))
def test_row_chunks(start, num_rows, max_rows):
    chunks = list(row_chunks(start, start + num_rows, max_rows))
    covered = [row for chunk in chunks for row in range(chunk.start, chunk.stop)]
    assert covered == list(range(start, start + num_rows))
    assert len(chunks) == -(-num_rows // max_rows)
    assert all(chunk.stop - chunk.start <= max_rows for chunk in chunks)


def test_rows_of_a_workspace():
    """On a CPU the default is 160 MiB, and rows come in sixteens."""
    weight = torch.zeros(2**20 - 3, 0)
    assert max_chunk_rows(weight, torch.float64, None, True) == 16
    assert max_chunk_rows(weight, torch.float32, None, True) == 32
    assert max_chunk_rows(weight, torch.float64, 2**28, True) == 32
    assert max_chunk_rows(weight, torch.float64, 1, True) == 16
    assert max_chunk_rows(weight, None, 1, True) > 1000


def test_rows_of_a_workspace_of_whole_rows():
    """Rows are aligned to 128 bytes, and one always fits. 1 GB is the default, a row 608,256."""
    weight = torch.empty(152_064, 0, device="meta")
    assert max_chunk_rows(weight, torch.float32, None, False) == 1644
    assert max_chunk_rows(weight, torch.bfloat16, None, False) == 3288
    assert max_chunk_rows(weight, torch.float32, 1, False) == 1
    assert max_chunk_rows(torch.empty(7, 0), torch.float32, 1280, False) == 10


@pytest.mark.parametrize("vocab_major", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocab_size", [1, 7, 100, 999])
def test_a_chunk_fits(dtype, vocab_major, vocab_size):
    weight, limit = torch.zeros(vocab_size, 0), 500_000
    max_rows = max_chunk_rows(weight, dtype, limit, vocab_major)
    workspace = Workspace(weight, max_rows, dtype, vocab_major)
    for num_rows in {0, 1, 17, max_rows // 2, max_rows}:
        logits = workspace.logits(num_rows)
        height = -(-num_rows // 16) * 16 if vocab_major else num_rows
        assert (logits.shape, logits.dtype) == ((height, vocab_size), dtype)
        logits.copy_(torch.arange(logits.numel()).view_as(logits))
        assert logits.flatten().tolist() == list(range(logits.numel()))
        used = sum((n - 1) * step for n, step in zip(logits.shape, logits.stride(), strict=True))
        assert (used + 1) * dtype.itemsize <= limit
        if vocab_major:
            assert logits.stride() == (1, height)
        else:
            assert logits.stride(1) == 1
            assert logits.stride(0) * dtype.itemsize % 128 == 0


@pytest.mark.parametrize("op", ["pair_loss", "logps"])
@pytest.mark.parametrize("given", [True, False], ids=["by the option", "by default"])
def test_no_chunk_exceeds_the_limit(op, given, monkeypatch):
    """200 rows, a vocabulary of 50 and fp32: the limit allows 48 rows."""
    scored, limit = [], 4 * 50 * 60
    score = chunked.ChunkedHead.score
    monkeypatch.setattr(
        chunked.ChunkedHead, "score", lambda head, rows: scored.append(rows) or score(head, rows)
    )
    if not given:
        monkeypatch.setattr(workspaces, "CPU_WORKSPACE_BYTES", limit)
    run_op(op, 200, HeadOptions(workspace_bytes=limit if given else None))
    assert max(rows.stop - rows.start for rows in scored) == (40 if op == "logps" else 34)
    forward = scored if op == "pair_loss" else scored[: len(scored) // 2]
    assert sum(rows.stop - rows.start for rows in forward) == 200


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory_is_kept_for_the_next_workspace(dtype):
    weight = torch.zeros(1000, 0)

    def memory_of(num_rows):
        return Workspace(weight, num_rows, dtype, True).logits(num_rows).data_ptr()

    first = memory_of(100)
    assert memory_of(30) == first
    larger = memory_of(300)
    assert memory_of(300) == memory_of(100) == larger


def test_threads_have_workspaces_of_their_own():
    weight = torch.zeros(1000, 0)
    barrier = threading.Barrier(2)

    def fill(number):
        mine = Workspace(weight, 10, torch.float32, True).logits(10).fill_(number)
        barrier.wait()
        return bool((mine == number).all())

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(fill, (1.0, 2.0))) == [True, True]


def test_memory_above_the_limit_is_not_kept():
    weight = torch.empty(2**20, 0)
    own = Workspace(weight, 64, torch.float32, True).logits(64)  # 256 MiB that are never written
    kept = Workspace(weight, 1, torch.float32, True).logits(1)
    assert kept.data_ptr() != own.data_ptr()


def test_a_workspace_made_in_inference_mode_serves_training():
    weight = torch.zeros(1000, 0)
    workspaces.thread_memory.__dict__.clear()
    with torch.inference_mode():
        Workspace(weight, 10, torch.float32, True).logits(10).fill_(1.0)
    logits = Workspace(weight, 10, torch.float32, True).logits(10)
    assert not logits.fill_(2.0).is_inference()


def run_op(op, num_rows, options=DEFAULTS):
    """Run an op on two pairs in fp32, a vocabulary of 50; the value and its gradients."""
    torch.manual_seed(0)
    hidden_states = torch.randn(num_rows, 8, requires_grad=True)
    weight = torch.randn(50, 8, requires_grad=True)
    labels = torch.randint(0, 50, (num_rows,))
    if op == "logps":
        value = linear_logps(hidden_states, weight, labels, options).square().sum()
    else:
        bounds = torch.linspace(0, num_rows, 5).long()
        ref_logps, loss = torch.zeros(4, dtype=torch.float64), make_loss("sigmoid", beta=0.1)
        value = linear_pair_loss(
            hidden_states, weight, labels, bounds, ref_logps, loss, options
        ).loss
    return [value, *torch.autograd.grad(value, [hidden_states, weight])]


@pytest.mark.parametrize("num_rows", [12, 44])
@pytest.mark.parametrize("op", ["pair_loss", "logps"])
def test_what_a_workspace_held_before_plays_no_part(op, num_rows):
    first = run_op(op, num_rows)
    workspaces.thread_memory.memory.fill_(0xFF)  # with all bits set, every float is NaN
    for got, wanted in zip(run_op(op, num_rows), first, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
