"""Chunks cover all rows. A workspace keeps to its limit and shows no old data."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpofast_kernels import HeadOptions, linear_logps, linear_pair_loss, make_loss
from dpofast_kernels.head import workspace as workspaces
from dpofast_kernels.head.plan import plan_chunks
from dpofast_kernels.head.workspace import (
    ChunkLimits,
    WeightGrad,
    Workspace,
    chunk_limits,
    row_chunks,
    rows_to_allocate,
)
from tests.kernels.head.cases import count_scored_rows

DEFAULTS = HeadOptions()


@given(st.integers(0, 50), st.integers(0, 200), st.integers(1, 60))
def test_row_chunks(start, num_rows, max_rows):
    chunks = list(row_chunks(start, start + num_rows, max_rows))
    covered = [row for chunk in chunks for row in range(chunk.start, chunk.stop)]
    assert covered == list(range(start, start + num_rows))
    assert len(chunks) == -(-num_rows // max_rows)
    assert all(chunk.stop - chunk.start <= max_rows for chunk in chunks)


SHAPES = {  # hidden size, vocabulary
    "0.5b": (896, 151_936),
    "llama3": (4096, 128_256),
    "gemma": (2304, 256_000),
    "7b": (3584, 152_064),
}


def cpu_rows(vocab_size, dtype, limit=None):
    limits = chunk_limits(
        *(10**6, (vocab_size, 8), dtype, dtype, "cpu", limit, True, WeightGrad.SUMMED)
    )
    return limits.wanted, limits.most


def device_limits(num_rows, shape, workspace_dtype, weight_grad, limit=None):
    hidden_size, vocab_size = SHAPES[shape]
    return chunk_limits(
        *(num_rows, (vocab_size, hidden_size), torch.bfloat16, workspace_dtype),
        *("cuda", limit, False, weight_grad),
    )


def test_rows_of_a_workspace_on_a_cpu():
    """The default is 160 MiB, for a single pair 640 MiB, and rows come in sixteens."""
    vocab_size = 2**20 - 3
    assert cpu_rows(vocab_size, torch.float64) == (16, 80)
    assert cpu_rows(vocab_size, torch.float32) == (32, 160)
    assert cpu_rows(vocab_size, torch.float64, 2**28) == (32, 32)
    assert cpu_rows(vocab_size, torch.float64, 1) == (16, 16)


@pytest.mark.parametrize("workspace_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("weight_grad", WeightGrad)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_call_on_a_device_keeps_to_its_memory(shape, weight_grad, workspace_dtype):
    """1.5 GB beyond the inputs, their gradients and the weight's in fp32, with 32,768 tokens."""
    (hidden_size, vocab_size), num_rows = SHAPES[shape], 2**15
    size, states = vocab_size * hidden_size, num_rows * hidden_size
    has_grad = weight_grad is not WeightGrad.NONE
    allowed = 1.5e9 + 2 * states + (2 * size + 4 * size) * has_grad
    for rows in (num_rows, 100, 4000, 9000):  # a call can be one chunk, or several
        limits = device_limits(rows, shape, workspace_dtype, weight_grad)
        is_rounded = weight_grad is WeightGrad.ROUNDED and rows <= limits.wanted
        used = max(limits.most, rows_to_allocate(limits.most, limits))
        used *= (vocab_size + 63) // 64 * 64 * workspace_dtype.itemsize
        used += 4 * states + (2 if is_rounded else 4) * size * has_grad
        assert used <= allowed
        assert limits.wanted <= limits.most
    # Not much less than allowed: B's chunks can have the wanted number of rows.
    if workspace_dtype == torch.bfloat16 and has_grad:
        assert device_limits(2**15, shape, workspace_dtype, weight_grad).wanted == 4096


def test_the_plan_of_a_call():
    """Uneven pairs of some 8,192 rows: as few chunks as fit, of nearly equal size."""
    lengths = [290, 350, 610, 77, 800, 640, 455, 200, 700, 512, 333, 444, 900, 700, 600, 589]
    rows = {name: plan_chunks(lengths, v, h).rows for name, (h, v) in SHAPES.items()}
    assert rows == {
        "0.5b": (4634, 3566),
        "llama3": (8200,),
        "gemma": (4634, 3566),
        "7b": (8200,),
    }
    plan = plan_chunks(lengths, 128_256, 4096)
    assert plan.rounds_at_once
    assert not plan_chunks(lengths, 128_256, 4096, knows_upstream=False).rounds_at_once
    assert not plan_chunks(lengths, 151_936, 896).rounds_at_once
    long = plan_chunks([4000, 4000, 10, 20], 151_936, 896)
    assert long.rows == (8000, 30)
    assert long.pieces == ((4000, 4000), (30,))
    # fp16 gradients of logits are fp32, in twice the memory.
    narrow, wide = (
        plan_chunks(lengths, 151_936, 896, torch.float16, dtype) for dtype in (None, torch.float32)
    )
    assert narrow == wide


def test_a_device_allocates_blocks_of_few_sizes():
    limits = ChunkLimits(4096, 6000, 6000)
    sizes = [rows_to_allocate(rows, limits) for rows in (1, 700, 751, 3000, 3001, 6000)]
    assert sizes == [1, 750, 1500, 3000, 6000, 6000]
    assert rows_to_allocate(6500, ChunkLimits(7000, 7000, 6000)) == 7000


@pytest.mark.parametrize("vocab_major", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocab_size", [1, 7, 100, 999])
def test_a_chunk_fits(dtype, vocab_major, vocab_size):
    weight, limit = torch.zeros(vocab_size, 0), 500_000
    max_rows = chunk_limits(
        *(10**6, (vocab_size, 0), dtype, dtype, "cpu", limit, vocab_major, WeightGrad.NONE)
    ).most
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
    scored, limit = count_scored_rows(monkeypatch), 4 * 50 * 60
    if not given:
        monkeypatch.setattr(workspaces, "CPU_WORKSPACE_BYTES", limit)
        monkeypatch.setattr(workspaces, "CPU_LONGEST_BYTES", limit)
    run_op(op, 200, HeadOptions(workspace_bytes=limit if given else None))
    # The log-probs are computed twice. Of two long pairs the second one is, but for its last piece.
    assert scored == ([40] * 10 if op == "logps" else [34, 34, 32, 34, 34, 32, 34, 34])


def test_a_pair_can_be_longer_than_other_chunks_of_a_cpu(monkeypatch):
    """Two pairs of 100 rows. With chunks of 48 rows, each still fits a chunk of its own."""
    scored = count_scored_rows(monkeypatch)
    monkeypatch.setattr(workspaces, "CPU_WORKSPACE_BYTES", 4 * 50 * 60)
    monkeypatch.setattr(workspaces, "CPU_LONGEST_BYTES", 4 * 50 * 130)
    run_op("pair_loss", 200)
    assert scored == [100, 100]


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
