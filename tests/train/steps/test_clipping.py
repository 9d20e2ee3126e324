"""Gradient clipping by a norm that is accurate on a CPU, because it is summed in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


class Dispatched(TorchDispatchMode):
    """Records the ATen operators that run, with the dtypes of their arguments and results."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        self.ran.append((function.overloadpacket.__name__, dtypes(arguments), dtypes(result)))
        return result

    def of(self, name):
        return [(given, made) for ran, given, made in self.ran if ran == name]


def dtypes(values):
    return [each.dtype for each in tree_leaves(values) if isinstance(each, torch.Tensor)]


def gradients_of_three_dtypes():
    made = parameters((40, 50), (7,), (2,), (3, 4))
    for index, dtype in ((1, torch.bfloat16), (2, torch.float64)):
        made[index] = torch.nn.Parameter(torch.zeros(made[index].shape, dtype=dtype))
        made[index].grad = torch.full_like(made[index], 2e-3)
    return made


def test_other_devices_sum_without_a_copy_in_float64(monkeypatch):
    """PyTorch casts the elements of a bf16 gradient while it sums, without a copy of the matrix."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda _: False))
    made = gradients_of_three_dtypes()
    with Dispatched() as dispatched:
        got = clip_grad_norm(made, math.inf)
    assert got.dtype == torch.float64
    assert got.item() == pytest.approx(true_norm(made), rel=1e-6)
    assert dispatched.of("_foreach_norm") == [
        ([torch.float32] * 2, [torch.float32] * 2),
        ([torch.bfloat16], [torch.float32]),
        ([torch.float64], [torch.float64]),
    ]
    assert not dispatched.of("_foreach_mul_")  # an infinite bound only measures


def test_other_devices_scale_by_a_factor_of_the_gradients_dtype(monkeypatch):
    """CUDA has one quick kernel for many gradients, if the factor's dtype is theirs."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda _: False))
    made, theirs = gradients_of_three_dtypes(), gradients_of_three_dtypes()
    with Dispatched() as dispatched:
        clip_grad_norm(made, 1e-3)
    of_each = [given for given, _ in dispatched.of("_foreach_mul_")]
    assert of_each == [[torch.float32] * 3, [torch.bfloat16] * 2, [torch.float64] * 2]
    assert not dispatched.of("_local_scalar_dense")  # the host waits for nothing
    norm = torch.tensor(true_norm(theirs), dtype=torch.float64)
    torch.nn.utils.clip_grads_with_norm_(theirs, 1e-3, norm)
    for got, wanted in zip(made, theirs, strict=True):
        rtol = 2**-8 if got.grad.dtype == torch.bfloat16 else 1e-6  # as a GPU rounds the factor
        torch.testing.assert_close(got.grad, wanted.grad, rtol=rtol, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_cpu_scales_as_pytorch_does_bit_for_bit(dtype):
    made = torch.nn.Parameter(torch.zeros(999, dtype=dtype))
    made.grad = torch.randn(999, generator=torch.Generator().manual_seed(1)).to(dtype)
    theirs = torch.nn.Parameter(torch.zeros(999, dtype=dtype))
    theirs.grad = made.grad.clone()
    norm = clip_grad_norm([made], 0.7)
    torch.nn.utils.clip_grads_with_norm_([theirs], 0.7, norm)
    assert torch.equal(made.grad, theirs.grad)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_isnt_finite_shows(bad):
    made = parameters((4,), (3,))
    made[0].grad[1] = bad
    assert not clip_grad_norm(made, 1.0).isfinite()


def test_no_gradient_has_no_norm():
    assert clip_grad_norm([torch.nn.Parameter(torch.zeros(2))], 1.0).item() == 0.0
