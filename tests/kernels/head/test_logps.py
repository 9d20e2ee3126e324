"""linear_logps: tiled PyTorch and Triton compared with the naive op."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpofast_kernels import HeadOptions, linear_logps
from dpofast_kernels.head import chunked
from tests.kernels.head.cases import (
    BACKENDS,
    FULL_OPTIONS,
    LENGTHS,
    PRECISION_CASES,
    SHORT_LENGTHS,
    allowed_error,
    make_inputs,
    options_for,
    relative_error,
    run_logps,
    set_chunk_rows,
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), 7, 1000])
def test_float64_equals_naive(backend, full, rows, monkeypatch):
    options = FULL_OPTIONS if full else {}
    inputs = make_inputs(bias=full, lengths=SHORT_LENGTHS if rows == 1 else LENGTHS)
    expected = run_logps(inputs, options_for(inputs, "naive", **options))
    set_chunk_rows(monkeypatch, rows)
    actual = run_logps(inputs, options_for(inputs, backend, **options))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(actual[name], value) <= 1e-12, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [*FULL_OPTIONS, "bias", "all but the cap"])
def test_each_option_alone(backend, name):
    inputs = make_inputs(hidden_size=9, vocab_size=130, lengths=(3, 4), bias=name == "bias")
    options = {key: value for key, value in FULL_OPTIONS.items() if key == name}
    if name == "all but the cap":
        options = {key: value for key, value in FULL_OPTIONS.items() if key != "softcap"}
    expected = run_logps(inputs, options_for(inputs, "naive", **options))
    actual = run_logps(inputs, options_for(inputs, backend, **options))
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert relative_error(actual[key], value) <= 1e-12, key


@pytest.mark.parametrize(("backend", "dtype", "full"), PRECISION_CASES)
def test_no_less_exact_than_naive_in_the_same_dtype(backend, dtype, full):
    options = FULL_OPTIONS if full else {}
    inputs = make_inputs(dtype, bias=full, hidden_size=123, vocab_size=1013)
    exact = inputs.to(torch.float64)
    truth = run_logps(exact, options_for(exact, "naive", **options))
    naive = run_logps(inputs, options_for(inputs, "naive", **options))
    actual = run_logps(inputs, options_for(inputs, backend, **options))
    for name, value in truth.items():
        allowed = allowed_error(relative_error(naive[name], value), dtype)
        assert relative_error(actual[name], value) <= allowed, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_result_dtype(backend):
    for dtype, expected in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        inputs = make_inputs(dtype, lengths=(1, 2))
        logps = linear_logps(
            inputs.hidden_states, inputs.weight, inputs.labels, options_for(inputs, backend)
        )
        assert logps.dtype == expected


@pytest.mark.parametrize("backend", ["naive", *BACKENDS])
@pytest.mark.parametrize("num_rows", [0, 1])
def test_few_rows(backend, num_rows):
    inputs = make_inputs(lengths=(num_rows, 0))
    found = run_logps(inputs, options_for(inputs, backend))
    assert found["logps"].shape == (num_rows,)
    assert found["hidden_states"].shape == (num_rows, 63)
    assert found["weight"].any() == bool(num_rows)


class LargestTensor(TorchDispatchMode):
    """Records the size in bytes of the largest result of any operation."""

    num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.num_bytes = max(self.num_bytes, result.nbytes)
        return result


@pytest.mark.parametrize("backend", ["naive", *BACKENDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.slow
def test_no_tensor_of_the_size_of_all_logits(backend, dtype, monkeypatch):
    inputs = make_inputs(dtype, hidden_size=8, lengths=(20, 20))
    set_chunk_rows(monkeypatch, 16)
    with LargestTensor() as largest:
        run_logps(inputs, options_for(inputs, backend))
    if backend == "naive":
        assert largest.num_bytes >= 40 * 507 * 4
    else:
        assert largest.num_bytes <= 16 * 512 * 4  # rows are aligned to 128 bytes


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_head_does_no_work_for_the_weight(backend, monkeypatch):
    inputs = make_inputs(lengths=SHORT_LENGTHS)
    inputs.weight.requires_grad_(False)
    monkeypatch.setattr(chunked, "add_weight_grad", None)
    monkeypatch.setattr(chunked, "weight_grad_into", None)
    assert run_logps(inputs, options_for(inputs, backend)).keys() == {"logps", "hidden_states"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    inputs = make_inputs(hidden_size=5, vocab_size=11, lengths=(2, 3), bias=True)

    def logps(hidden_states, weight, bias):
        options = HeadOptions(bias=bias, backend=backend, **FULL_OPTIONS)
        return linear_logps(hidden_states, weight, inputs.labels, options)

    leaves = (inputs.hidden_states, inputs.weight, inputs.bias)
    assert torch.autograd.gradcheck(logps, leaves, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_certain_tokens_keep_their_gradient(backend):
    """p - 1 is computed before any rounding: p = 0.999 rounds to 1 in bf16."""
    weight = torch.zeros(16, 4, dtype=torch.bfloat16)
    weight[3] = 1.0
    hidden_states = torch.full((1, 4), 2.4, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.tensor([3])
    exact = hidden_states.detach().double().requires_grad_()
    linear_logps(exact, weight.double(), labels, HeadOptions(backend="naive")).sum().backward()
    options = HeadOptions(backend=backend)
    linear_logps(hidden_states, weight, labels, options).sum().backward()
    assert exact.grad.abs().max() < 2e-3
    assert relative_error(hidden_states.grad.double(), exact.grad) <= 4e-3


@pytest.mark.parametrize("backend", ["naive", *BACKENDS])
def test_padded_positions_without_a_label_cost_nothing_and_get_zero(backend):
    inputs = make_inputs(bias=True)
    hidden_states = inputs.hidden_states.detach()[:28].view(4, 7, 63).requires_grad_()
    scored = torch.rand(4, 7, generator=torch.Generator().manual_seed(1)) < 0.6
    hidden_states.data[~scored] = float("nan")  # must never be read
    labels = torch.where(scored, inputs.labels[:28].view(4, 7), -100)
    upstream = torch.linspace(-1.0, 2.0, 28, dtype=torch.float64).view(4, 7)
    options = options_for(inputs, backend)
    logps = linear_logps(hidden_states, inputs.weight, labels, options)
    assert logps.shape == (4, 7)
    assert not logps[~scored].any()
    (logps * upstream).sum().backward()
    d_weight, inputs.weight.grad = inputs.weight.grad, None

    rows = hidden_states.detach()[scored].requires_grad_()
    expected = linear_logps(rows, inputs.weight, labels[scored], options_for(inputs, "naive"))
    (expected * upstream[scored]).sum().backward()
    assert relative_error(logps[scored].detach(), expected.detach()) <= 1e-12
    assert relative_error(hidden_states.grad[scored], rows.grad) <= 1e-12
    assert not hidden_states.grad[~scored].any()
    assert relative_error(d_weight, inputs.weight.grad) <= 1e-12


def test_nothing_to_score_in_a_padded_batch():
    inputs = make_inputs()
    hidden_states = inputs.hidden_states.detach()[:6].view(2, 3, 63).requires_grad_()
    logps = linear_logps(hidden_states, inputs.weight, torch.full((2, 3), -100))
    logps.sum().backward()
    assert not logps.any()
    assert not hidden_states.grad.any()
    assert not inputs.weight.grad.any()
