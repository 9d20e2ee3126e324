"""A workspace holds a chunk's logits within its limit, and what it held before plays no part."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dpofast_kernels import linear_logps, linear_pair_loss, make_loss
from dpofast_kernels.head import workspace as workspaces
from dpofast_kernels.head.chunks import max_chunk_rows
from dpofast_kernels.head.workspace import Workspace


def test_rows_of_a_workspace():
    """160 MiB on a CPU; from 128 bytes on lines are aligned to that, and one row always fits."""
    weight = torch.zeros(2**20 - 3, 0)
    assert max_chunk_rows(weight, torch.float64, None) == 16  # 20 would fit, but for alignment
    assert max_chunk_rows(weight, torch.float64, 2**26) == 8
    assert max_chunk_rows(weight, torch.float64, 1) == 1
    assert max_chunk_rows(weight, None, 1) > 1000


def test_rows_of_a_workspace_on_a_device():
    """1 GB, where a row of 152,064 fp32 numbers has 608,256 bytes."""
    weight = torch.empty(152_064, 0, device="meta")
    assert max_chunk_rows(weight, torch.float32, None) == 1632
    assert max_chunk_rows(weight, torch.bfloat16, None) == 3264


@pytest.mark.parametrize("vocab_major", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocab_size", [1, 7, 100, 999])
def test_a_chunk_fits_and_its_lines_are_aligned(dtype, vocab_major, vocab_size):
    weight = torch.zeros(vocab_size, 0)
    limit = 50_000
    max_rows = max_chunk_rows(weight, dtype, limit)
    workspace = Workspace(weight, max_rows, dtype, vocab_major)
    for num_rows in {0, 1, max_rows // 2, max_rows}:
        logits = workspace.logits(num_rows)
        assert (logits.shape, logits.dtype) == ((num_rows, vocab_size), dtype)
        logits.copy_(torch.arange(num_rows * vocab_size).view_as(logits))
        assert logits.flatten().tolist() == list(range(num_rows * vocab_size))
        strides = logits.stride()[:: -1 if vocab_major else 1]
        length = num_rows if vocab_major else vocab_size
        assert strides[1] == 1
        assert strides[0] * dtype.itemsize % 128 == 0 or length * dtype.itemsize < 128
    assert max_rows == 1 or workspace.num_bytes <= limit


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
    own = Workspace(weight, 64, torch.float32, True).logits(64)  # 256 MiB, none written to
    assert own.shape == (64, 2**20)
    kept = Workspace(weight, 1, torch.float32, True).logits(1)
    assert kept.data_ptr() != own.data_ptr()


def test_a_workspace_made_in_inference_mode_serves_training():
    weight = torch.zeros(1000, 0)
    workspaces._kept.__dict__.clear()
    with torch.inference_mode():
        Workspace(weight, 10, torch.float32, True).logits(10).fill_(1.0)
    logits = Workspace(weight, 10, torch.float32, True).logits(10)
    assert not logits.fill_(2.0).is_inference()


@pytest.mark.parametrize("num_rows", [12, 44])
@pytest.mark.parametrize("op", ["pair_loss", "logps"])
def test_what_a_workspace_held_before_plays_no_part(op, num_rows):
    torch.manual_seed(0)
    hidden_states = torch.randn(num_rows, 8, requires_grad=True)
    weight = torch.randn(50, 8, requires_grad=True)
    labels = torch.randint(0, 50, (num_rows,))
    bounds = torch.linspace(0, num_rows, 5).long()

    def run():
        if op == "logps":
            value = linear_logps(hidden_states, weight, labels).square().sum()
        else:
            ref_logps, loss = torch.zeros(4, dtype=torch.float64), make_loss("sigmoid", beta=0.1)
            value = linear_pair_loss(hidden_states, weight, labels, bounds, ref_logps, loss).loss
        return [value, *torch.autograd.grad(value, [hidden_states, weight])]

    first = run()
    workspaces._kept.memory.fill_(0xFF)  # of all bits set, every float is NaN
    for got, wanted in zip(run(), first, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
