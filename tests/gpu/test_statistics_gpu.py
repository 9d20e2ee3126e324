"""Statistics of rows and WPO's weights from the head's Triton back ends, compiled, on a device."""

from __future__ import annotations

import pytest
import torch

from dpofast_kernels import (
    STATISTICS,
    PairExtras,
    PairWeighting,
    linear_pair_loss,
    linear_statistics,
    make_loss,
)
from tests.gpu.head_cases import (
    BACKENDS,
    LENGTHS,
    TOLERANCES,
    inputs,
    leaves_of,
    options_for,
    relative,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]
CASES = [
    (backend, dtype)
    for backend in BACKENDS
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    if backend == "triton" or dtype != torch.float32
]


def statistics_of(tensors, backend, dtype, full):
    """[4, N] fp64."""
    leaves, options = leaves_of(tensors, dtype), options_for(backend, dtype, full)
    return linear_statistics(**leaves, labels=tensors["labels"], options=options).double()


def with_top_labels(tensors):
    """The same, where every other label is the most likely token."""
    logits = tensors["hidden_states"].double() @ tensors["weight"].double().t()
    top, labels = logits.argmax(-1), tensors["labels"]
    is_even = torch.arange(len(top), device=top.device) % 2 == 0
    return {**tensors, "labels": torch.where(is_even, top, labels)}


@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_statistics(backend, dtype, full):
    tensors = with_top_labels(inputs(dtype))
    truth = statistics_of(tensors, "naive", torch.float64, full)
    found = statistics_of(tensors, backend, dtype, full)
    assert 0 < truth[2].sum() < len(tensors["labels"])
    for name, got, expected in zip(STATISTICS, found, truth, strict=True):
        if name == "is_top":
            assert torch.equal(got, expected)
        else:
            assert relative(got, expected) < 1e-5, name


def weighted(tensors, backend, dtype):
    """Output and gradients of a loss with all statistics and WPO's weights."""
    leaves = leaves_of(tensors, dtype)
    output = linear_pair_loss(
        **{**tensors, **leaves},
        loss=make_loss("apo_zero", 0.01),
        options=options_for(backend, dtype, full=False),
        extras=PairExtras(weighting=PairWeighting(), statistics=STATISTICS),
    )
    # The weights of unlikely answers are tiny.
    scale = 1.0 / output.pair_weights.max()
    (output.loss * scale).backward()
    return output, {name: leaf.grad.double() for name, leaf in leaves.items()}


@pytest.mark.parametrize("rows", [50, 10_000])
@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_weighted_loss_and_summed_statistics(backend, dtype, rows, chunk_rows):
    """Pairs of 42, 275 and 131 rows: with 50 rows to a chunk, two of them are long."""
    tensors = with_top_labels(inputs(dtype))
    # References near the policy, whose log-prob of a label is about -15 nats or 0.
    tensors["ref_logps"] = tensors["ref_logps"] / 2.0
    truth, expected = weighted(tensors, "naive", torch.float64)
    chunk_rows(rows)
    output, gradients = weighted(tensors, backend, dtype)
    assert output.statistics.shape == (len(STATISTICS), len(LENGTHS))
    for name, got, value in zip(STATISTICS, output.statistics, truth.statistics, strict=True):
        assert relative(got, value) < 1e-5, name
    assert relative(output.pair_weights, truth.pair_weights) < 1e-4
    assert relative(output.loss.detach(), truth.loss.detach()) < 1e-4
    for name, value in expected.items():
        assert relative(gradients[name], value) < TOLERANCES[dtype], name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [50, 10_000])
def test_the_device_is_never_waited_for(rows, backend, chunk_rows):
    tensors = inputs(torch.bfloat16)
    chunk_rows(rows)
    weighted(tensors, backend, torch.bfloat16)  # compiles, and finds out what the device can do
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        weighted(tensors, backend, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
