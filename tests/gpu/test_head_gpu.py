"""The head's Triton backend as it really runs: compiled, on a CUDA or ROCm device."""

from __future__ import annotations

import pytest
import torch

from dpofast_kernels import HeadOptions, backend_for, linear_pair_loss, make_loss

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


def run(tensors: dict[str, torch.Tensor], backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Loss, log-probs and both gradients, in float64."""
    leaves = {
        name: tensors[name].detach().to(dtype).requires_grad_()
        for name in ("hidden_states", "weight")
    }
    loss, options = make_loss("sigmoid", 0.01), HeadOptions(backend=backend)
    output = linear_pair_loss(**{**tensors, **leaves}, loss=loss, options=options)
    output.loss.backward()
    results = [output.loss, output.logps, *(leaf.grad for leaf in leaves.values())]
    return [result.detach().double() for result in results]


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("dtype", "logps_tolerance", "gradient_tolerance"),
    [(torch.float32, 1e-5, 1e-4), (torch.bfloat16, 1e-5, 3e-3)],
)
def test_triton_is_chosen_and_is_the_float64_truth(dtype, logps_tolerance, gradient_tolerance):
    tensors = inputs(dtype)
    assert backend_for(tensors["weight"]) == "triton"
    truth = run(tensors, "naive", torch.float64)
    got = run(tensors, "auto", dtype)
    for index, tolerance in enumerate([1e-4, logps_tolerance, *[gradient_tolerance] * 2]):
        assert relative(got[index], truth[index]) < tolerance, index


def test_two_runs_are_equal_bit_for_bit():
    tensors = inputs(torch.bfloat16)
    first, second = (run(tensors, "auto", torch.bfloat16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
