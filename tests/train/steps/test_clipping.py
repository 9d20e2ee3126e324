"""Gradient clipping by a norm that is accurate on a CPU, because it is summed in float64."""

from __future__ import annotations

import math

import pytest
import torch

from dpofast.train.steps.clipping import CHUNK_ELEMENTS, clip_grad_norm


def parameters(*sizes):
    torch.manual_seed(0)
    made = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape) * 1e-3
    return made


def true_norm(made):
    return math.sqrt(sum(p.grad.double().square().sum().item() for p in made if p.grad is not None))


def test_the_norm_is_right_where_pytorchs_is_not():
    made = parameters((2000, 2048), (7,), ())
    expected = true_norm(made)
    theirs = torch.nn.utils.clip_grad_norm_(made, math.inf).item()
    assert abs(theirs / expected - 1.0) > 1e-5
    assert clip_grad_norm(iter(made), math.inf).item() == pytest.approx(expected, rel=1e-12)
    assert true_norm(made) == expected  # an infinite bound scales nothing


@pytest.mark.parametrize("size", [(3,), (CHUNK_ELEMENTS + 1,)])
@pytest.mark.parametrize("max_norm", [0.002, 0.1])
def test_gradients_are_scaled_to_the_norm(size, max_norm):
    made = parameters(size, (5, 2))
    without = torch.nn.Parameter(torch.zeros(2))
    scale = min(1.0, max_norm / (true_norm(made) + 1e-6))
    expected = [parameter.grad * scale for parameter in made]
    clip_grad_norm([*made, without], max_norm)
    for got, wanted in zip(made, expected, strict=True):
        assert got.grad.dtype == torch.float32
        torch.testing.assert_close(got.grad, wanted, rtol=1e-6, atol=0.0)
    assert without.grad is None


def test_other_devices_sum_without_a_copy_in_float64(monkeypatch):
    """PyTorch casts the elements of a bf16 gradient while it sums, without a copy of the matrix."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda _: False))
    asked = []

    def norm(gradient, dtype):
        asked.append((gradient.dtype, dtype))
        return vector_norm(gradient, dtype=dtype)

    vector_norm = torch.linalg.vector_norm
    monkeypatch.setattr(torch.linalg, "vector_norm", norm)
    made = parameters((40, 50), (7,), (2,))
    made[1] = torch.nn.Parameter(torch.zeros(7, dtype=torch.bfloat16))
    made[1].grad = torch.full((7,), 2e-3, dtype=torch.bfloat16)
    made[2] = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    made[2].grad = torch.full((2,), 3e-3, dtype=torch.float64)
    got = clip_grad_norm(made, math.inf)
    assert got.dtype == torch.float64
    assert got.item() == pytest.approx(true_norm(made), rel=1e-6)
    assert asked == [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ]


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_isnt_finite_shows(bad):
    made = parameters((4,), (3,))
    made[0].grad[1] = bad
    assert not clip_grad_norm(made, 1.0).isfinite()


def test_no_gradient_has_no_norm():
    assert clip_grad_norm([torch.nn.Parameter(torch.zeros(2))], 1.0).item() == 0.0
