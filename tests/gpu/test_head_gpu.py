"""The head's Triton backend as it really runs: compiled, on a CUDA or ROCm device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dpofast_kernels import (
    HeadOptions,
    backend_for,
    linear_logps,
    linear_pair_loss,
    make_loss,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]

LENGTHS = (37, 5, 211, 64, 1, 130)


def inputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows, hidden_size, vocab_size = sum(LENGTHS), 256, 32003
    return {
        "hidden_states": torch.randn(rows, hidden_size, generator=generator).to("cuda", dtype),
        "weight": (torch.randn(vocab_size, hidden_size, generator=generator) * 0.2).to(
            "cuda", dtype
        ),
        "labels": torch.randint(0, vocab_size, (rows,), generator=generator).to("cuda"),
        "bounds": torch.tensor((0, *LENGTHS)).cumsum(0),
        "ref_logps": torch.randn(len(LENGTHS), generator=generator).double() * 100 - 1000,
    }


def run(
    tensors: dict[str, torch.Tensor], backend: str, dtype: torch.dtype, full: bool = False
) -> list[torch.Tensor]:
    """Loss, log-probs and both gradients, in float64; `full` with a bias, a cap and scales."""
    leaves = {
        name: tensors[name].detach().to(dtype).requires_grad_()
        for name in ("hidden_states", "weight")
    }
    options = HeadOptions(backend=backend)
    if full:
        bias = torch.linspace(-1.0, 1.0, 32003, device="cuda").bfloat16().to(dtype)
        options = replace(options, bias=bias, softcap=8.0, logit_scale=0.5, temperature=0.7)
    loss = make_loss("sigmoid", 0.01)
    output = linear_pair_loss(**{**tensors, **leaves}, loss=loss, options=options)
    output.loss.backward()
    results = [output.loss, output.logps, *(leaf.grad for leaf in leaves.values())]
    return [result.detach().double() for result in results]


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("backend", "dtype", "gradient_tolerance"),
    [
        ("auto", torch.float32, 1e-4),
        ("auto", torch.bfloat16, 3e-3),
        ("auto", torch.float16, 3e-3),
        ("triton_fused", torch.bfloat16, 3e-3),
        ("triton_fused", torch.float16, 3e-3),
    ],
)
@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
def test_triton_is_the_float64_truth(backend, dtype, gradient_tolerance, full):
    tensors = inputs(dtype)
    assert backend_for(tensors["weight"]) == "triton"
    truth = run(tensors, "naive", torch.float64, full)
    got = run(tensors, backend, dtype, full)
    for index, tolerance in enumerate([1e-4, 1e-5, *[gradient_tolerance] * 2]):
        assert relative(got[index], truth[index]) < tolerance, index


@pytest.mark.parametrize("backend", ["triton", "triton_fused"])
@pytest.mark.parametrize("vocab_size", [507, 32003, 151936])
def test_per_token_logps_are_within_1e_4(backend, vocab_size):
    """bf16 inputs whose logits spread widely; no logit is ever rounded to bf16."""
    generator = torch.Generator("cuda").manual_seed(0)
    hidden_states = torch.randn(123, 896, generator=generator, device="cuda").bfloat16()
    weight = torch.randn(vocab_size, 896, generator=generator, device="cuda").mul_(0.2).bfloat16()
    labels = torch.randint(vocab_size, (123,), generator=generator, device="cuda")
    truth = linear_logps(
        hidden_states.double(), weight.double(), labels, HeadOptions(backend="naive")
    )
    got = linear_logps(hidden_states, weight, labels, HeadOptions(backend=backend))
    assert (got.double() - truth).abs().max() <= 1e-4


@pytest.mark.parametrize("backend", ["triton", "triton_fused"])
def test_two_runs_are_equal_bit_for_bit(backend):
    tensors = inputs(torch.bfloat16)
    first, second = (run(tensors, backend, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
