"""The matrix products: upcast in blocks, or of bf16 matrices with an fp32 result as on a device."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from dpofast_kernels import make_loss
from dpofast_kernels.head import dtypes, matmul, rows_triton, tiled
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
    """Let the CPU multiply bf16 matrices with an fp32 result, as CUDA does; names of the calls."""
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
    for module in (dtypes, matmul):
        monkeypatch.setattr(module, "has_wide_products", lambda device, dtype: True)
    # Rows of logits are contiguous, as on every device but a CPU.
    rows = property(lambda rows: False, lambda rows, value: None)
    monkeypatch.setattr(tiled.TorchRows, "vocab_major", rows, raising=False)
    return calls


@pytest.mark.parametrize("backend", ["torch", "triton", "triton_fused"])
def test_products_of_bf16_matrices(backend, device_products, monkeypatch):
    inputs = make_inputs(torch.bfloat16, bias=True)
    # Two chunks: the first two pairs have 17 rows, the third one 14.
    set_chunk_rows(monkeypatch, 20)
    exact = inputs.to(torch.float64)
    truth = run_pair_loss(exact, SIGMOID, options_for(exact, "naive", softcap=5.0))
    found = run_pair_loss(inputs, SIGMOID, options_for(inputs, backend, softcap=5.0))
    expected = ["mm", "mm", "mm", "mm", "mm", "addmm"]
    if backend == "triton_fused":  # the library computes no logits
        expected = ["mm", "mm", "mm", "addmm"]
    assert device_products == expected
    assert relative_error(found["logps"], truth["logps"]) <= 1e-6
    # Two roundings to bf16: d_logits and the result. The Triton back ends have a third one, of
    # scaled hidden states. The interpreter cuts digits off, while a device rounds to nearest.
    tolerance = 3e-3 if backend == "torch" else 8e-3
    for name in ("hidden_states", "weight", "bias"):
        assert relative_error(found[name], truth[name]) <= tolerance, name


@pytest.mark.parametrize("spread", [1.0, 2.0, 4.0])
def test_products_of_bf16_matrices_are_no_less_exact_than_naive(spread, device_products):
    """Both round d_logits and results. The naive op also rounds logits, which matters more the
    wider they spread. How a single pair is rounded is chance, so there are many pairs."""
    squares = {"ours": Counter(), "naive": Counter()}
    for seed in range(4):
        inputs = make_inputs(
            torch.bfloat16, bias=True, spread=spread, lengths=(3 + seed, 5) * 16, seed=seed
        )
        exact = inputs.to(torch.float64)
        truth = run_pair_loss(exact, SIGMOID, options_for(exact, "naive"))
        for name, backend in (("ours", "torch"), ("naive", "naive")):
            found = run_pair_loss(inputs, SIGMOID, options_for(inputs, backend))
            for key in ("logps", "hidden_states", "weight", "bias"):
                squares[name][key] += relative_error(found[key], truth[key]) ** 2
    assert device_products
    for key, square in squares["ours"].items():
        assert square <= squares["naive"][key], key
        assert (square / 4) ** 0.5 <= 3e-3, key


def test_a_triton_gradient_is_rounded_once(monkeypatch):
    """In bf16 it is the fp32 one with its last bits cut off: the interpreter rounds that way."""
    inputs = make_inputs(torch.bfloat16, bias=True)
    coefficients = torch.linspace(-1e-3, 2e-3, len(inputs.labels))
    options = options_for(inputs, "triton", softcap=5.0)
    options = replace(options, bias=options.bias.detach().float())
    made = {}
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(rows_triton, "product_dtype", lambda _, dtype=dtype: dtype)
        rows = rows_triton.TritonRows(inputs.weight.detach(), options)
        workspace = torch.empty(len(inputs.labels), 512)[:, :507]
        scored = rows.score(inputs.hidden_states.detach(), inputs.labels, workspace, True)
        made[dtype] = rows.differentiate(scored, inputs.labels, coefficients)
        assert made[dtype].d_logits.dtype == dtype
    assert torch.equal(*(gradients.factors for gradients in made.values()))
    whole, cut = (gradients.d_logits.float() for gradients in made.values())
    assert whole.abs().max() > 1e-4
    assert ((whole - cut).abs() <= 2.0**-7 * whole.abs()).all()


@pytest.fixture
def pretended_gpu(monkeypatch):
    """A function that makes the products of a pretended GPU fail with an error, or work."""
    dtypes.has_wide_products.cache_clear()
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, dtype, device: zeros(*size, dtype=dtype))

    def fails(mm=None, addmm=None):
        for name, error in (("mm", mm), ("addmm", addmm)):

            def product(*matrices, out_dtype, out, error=error):
                if error is not None:
                    raise error
                return out

            monkeypatch.setattr(torch, name, product)
        return dtypes.has_wide_products(torch.device("cuda"), torch.bfloat16)

    yield fails
    dtypes.has_wide_products.cache_clear()


def test_wide_products_are_tried_once_and_logged(pretended_gpu, caplog):
    with caplog.at_level("INFO", "dpofast_kernels.head.dtypes"):
        assert pretended_gpu()
        assert pretended_gpu(mm=RuntimeError("never tried again"))
    assert caplog.messages == ["cuda multiplies torch.bfloat16 matrices with an fp32 result."]


@pytest.mark.parametrize("product", ["mm", "addmm"])
def test_a_device_without_one_of_the_wide_products_is_named(product, pretended_gpu, caplog):
    """The CUDA builds of PyTorch 2.8 and 2.9 have mm with an fp32 result, but not addmm."""
    error = RuntimeError("self and mat2 must have the same dtype\nmore")
    assert not pretended_gpu(**{product: error})
    assert "cuda multiplies no torch.bfloat16 matrices with an fp32 result (self and" in caplog.text
    assert caplog.records[0].levelname == "WARNING"


def test_no_memory_to_try_wide_products_is_no_answer(pretended_gpu):
    with pytest.raises(torch.OutOfMemoryError):
        pretended_gpu(addmm=torch.OutOfMemoryError("CUDA out of memory"))
    assert pretended_gpu()


def test_fp16_gradients_are_never_products_of_fp16(monkeypatch):
    """Even if a device has such products: a pair's coefficient is below fp16's range."""
    monkeypatch.setattr(dtypes, "has_wide_products", lambda device, dtype: True)
    found = {
        dtype: dtypes.product_dtype(torch.zeros(1, dtype=dtype))
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
