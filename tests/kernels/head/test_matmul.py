"""The products: upcast in blocks, or of bf16 matrices with an fp32 result, as on a device."""

from __future__ import annotations

import pytest
import torch

from dpofast_kernels import make_loss
from dpofast_kernels.head import matmul
from tests.kernels.head.cases import (
    make_inputs,
    options_for,
    relative_error,
    run_pair_loss,
    set_chunk_rows,
)

SIGMOID = make_loss("sigmoid", beta=0.3)


@pytest.fixture
def device_products(monkeypatch):
    """Let the CPU multiply bf16 matrices with an fp32 result, as CUDA does; counts the products."""
    calls = []

    def with_out_dtype(function):
        def product(*matrices, out_dtype=None, out):
            if out_dtype is None:
                return function(*matrices, out=out)
            assert {matrix.dtype for matrix in matrices[-2:]} == {torch.bfloat16}
            assert out_dtype == out.dtype == torch.float32
            calls.append(function.__name__)
            return out.copy_(function(*(matrix.to(out_dtype) for matrix in matrices)))

        return product

    monkeypatch.setattr(torch, "mm", with_out_dtype(torch.mm))
    monkeypatch.setattr(torch, "addmm", with_out_dtype(torch.addmm))
    monkeypatch.setattr(matmul, "has_wide_products", lambda device, dtype: True)
    return calls


@pytest.mark.parametrize("backend", ["torch", "triton", "triton_fused"])
def test_products_of_bf16_matrices(backend, device_products, monkeypatch):
    inputs = make_inputs(torch.bfloat16, bias=True)
    # two chunks of logits: of two pairs and of one
    set_chunk_rows(monkeypatch, 40, 507, 2 if backend == "triton_fused" else 4)
    exact = inputs.to(torch.float64)
    truth = run_pair_loss(exact, SIGMOID, options_for(exact, "naive", softcap=5.0))
    found = run_pair_loss(inputs, SIGMOID, options_for(inputs, backend, softcap=5.0))
    expected = ["mm", "mm", "mm", "mm", "mm", "addmm"]
    if backend == "triton_fused":  # makes no logits by the library's product
        expected = ["mm", "mm", "mm", "addmm"]
    assert device_products == expected
    assert relative_error(found["logps"], truth["logps"]) <= 1e-6
    # three roundings to bf16, of d_logits, scaled hidden states and the result, are just below
    # 3e-3; the interpreter cuts off where a device rounds to nearest
    tolerance = 3e-3 if backend == "torch" else 8e-3
    for name in ("hidden_states", "weight", "bias"):
        assert relative_error(found[name], truth[name]) <= tolerance, name


def test_products_of_bf16_matrices_are_no_less_exact_than_naive(device_products):
    """With logits that spread as a model's do; naive rounds those to bf16, which narrow ones bear
    better than the third rounding here."""
    inputs = make_inputs(torch.bfloat16, bias=True, spread=4.0)
    exact = inputs.to(torch.float64)
    truth = run_pair_loss(exact, SIGMOID, options_for(exact, "naive"))
    naive = run_pair_loss(inputs, SIGMOID, options_for(inputs, "naive"))
    found = run_pair_loss(inputs, SIGMOID, options_for(inputs, "torch"))
    assert device_products
    for name in ("logps", "hidden_states", "weight", "bias"):
        error = relative_error(naive[name], truth[name])
        assert relative_error(found[name], truth[name]) <= error, name


def test_fp16_gradients_are_never_products_of_fp16(monkeypatch):
    """Also where a device has such products: a pair's coefficient lies below fp16's range."""
    monkeypatch.setattr(matmul, "has_wide_products", lambda device, dtype: True)
    found = {
        dtype: matmul.product_dtype(torch.zeros(1, dtype=dtype))
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    }
    assert found == {
        torch.float16: torch.float32,
        torch.bfloat16: torch.bfloat16,
        torch.float32: torch.float32,
        torch.float64: torch.float64,
    }


def test_the_weight_is_upcast_in_blocks(monkeypatch):
    inputs = make_inputs(torch.bfloat16)
    expected = run_pair_loss(inputs, SIGMOID, options_for(inputs, "torch"))
    monkeypatch.setattr(matmul, "VOCAB_BLOCK", 100)
    found = run_pair_loss(inputs, SIGMOID, options_for(inputs, "torch"))
    for name, value in expected.items():
        assert relative_error(found[name], value) <= 1e-5, name
