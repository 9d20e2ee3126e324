"""Inputs for the head's ops, and functions that run them and return all there is to compare."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from dpofast_kernels import (
    HeadOptions,
    PairExtras,
    PairLoss,
    linear_logps,
    linear_pair_loss,
    make_loss,
    pair_metrics,
)
from dpofast_kernels.head import chunked
from dpofast_kernels.head.workspace import ChunkLimits

LENGTHS = (3, 1, 8, 5, 2, 12)  # scored tokens of three pairs, which have 4, 13 and 14 rows
SHORT_LENGTHS = (2, 1, 1, 3)  # two pairs of 3 and 4 rows: the interpreter takes time for each row
BACKENDS = ("torch", "triton", "triton_fused")
# (backend, dtype, full). The interpreter is slow: without options, it runs bf16 only.
PRECISION_CASES = [
    pytest.param(
        *(backend, dtype, full),
        marks=[] if backend == "torch" or dtype == torch.bfloat16 else pytest.mark.slow,
    )
    for backend in BACKENDS
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for full in (False, True)
    if backend == "torch" or full or dtype == torch.bfloat16
]
FULL_OPTIONS = {"softcap": 5.0, "logit_scale": 0.7, "temperature": 1.3}
LOSS_CASES = {
    "sigmoid": make_loss("sigmoid", beta=0.3),
    "cdpo": make_loss("sigmoid", beta=0.3, label_smoothing=0.2),
    "hinge": make_loss("hinge", beta=0.3),
    "ipo": make_loss("ipo", beta=0.3),
}
SIGMOID = LOSS_CASES["sigmoid"]


@dataclass
class Inputs:
    """Leaves of autograd in one dtype, and the rest of an op's arguments."""

    hidden_states: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    labels: Tensor  # [N]
    bounds: Tensor  # [2P+1]
    ref_logps: Tensor  # [2P]

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same numbers in another dtype, as new leaves."""

        def leaf(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.detach().to(dtype).requires_grad_()

        return Inputs(
            leaf(self.hidden_states),
            leaf(self.weight),
            leaf(self.bias),
            self.labels,
            self.bounds,
            self.ref_logps,
        )


def make_inputs(
    dtype: torch.dtype = torch.float64,
    *,
    hidden_size: int = 63,
    vocab_size: int = 507,
    lengths: tuple[int, ...] = LENGTHS,
    bias: bool = False,
    spread: float = 2.0,
    seed: int = 0,
) -> Inputs:
    """Random inputs; `spread` is about the standard deviation of their logits."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    bounds = torch.tensor(list(accumulate(lengths, initial=0)))
    num_rows = int(bounds[-1])
    inputs = Inputs(
        normal(num_rows, hidden_size),
        normal(vocab_size, hidden_size, scale=spread / hidden_size**0.5),
        normal(vocab_size) if bias else None,
        torch.randint(0, vocab_size, (num_rows,), generator=generator),
        bounds,
        -6.0 * bounds.diff() + normal(len(lengths)),
    )
    return inputs.to(dtype)


def options_for(inputs: Inputs, backend: str, **options: float) -> HeadOptions:
    return HeadOptions(bias=inputs.bias, backend=backend, **options)


def run_pair_loss(
    inputs: Inputs,
    loss: PairLoss,
    options: HeadOptions,
    upstream: float = 1.7,
    **extras: Tensor | None,
) -> dict[str, Tensor]:
    """Loss, logps and all gradients of `linear_pair_loss`, as float64."""
    output = linear_pair_loss(
        inputs.hidden_states,
        inputs.weight,
        inputs.labels,
        inputs.bounds,
        inputs.ref_logps,
        loss,
        options,
        PairExtras(**extras),
    )
    assert output.loss.dtype == output.logps.dtype == torch.float64
    assert not output.logps.requires_grad
    if extras.get("pairs") is None:
        per_token = loss.has_rewards_per_token
        logps = (output.logps, inputs.ref_logps)
        metrics = pair_metrics(*logps, inputs.bounds, loss.beta, per_token)
        torch.testing.assert_close(
            output.metrics, torch.stack([*metrics.values()]), rtol=1e-12, atol=0, equal_nan=True
        )
    (output.loss * upstream).backward()
    found = {"loss": output.loss.detach(), "logps": output.logps, "metrics": output.metrics}
    return found | gradients(inputs)


def run_logps(inputs: Inputs, options: HeadOptions) -> dict[str, Tensor]:
    """Log-probs and all gradients of `linear_logps`, as float64."""
    logps = linear_logps(inputs.hidden_states, inputs.weight, inputs.labels, options)
    upstream = torch.linspace(-1.0, 2.0, len(logps), dtype=logps.dtype)
    (logps * upstream).sum().backward()
    return {"logps": logps.detach().double(), **gradients(inputs)}


def gradients(inputs: Inputs) -> dict[str, Tensor]:
    found = {}
    for name in ("hidden_states", "weight", "bias"):
        tensor = getattr(inputs, name)
        if tensor is not None and tensor.grad is not None:
            assert tensor.grad.dtype == tensor.dtype
            found[name], tensor.grad = tensor.grad.double(), None
    return found


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference, divided by the norm of what is expected."""
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Compare what `run_pair_loss` returns."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(actual[name], value) <= tolerance, name


def set_chunk_rows(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Set the most rows of a chunk, whatever fits the workspace."""
    monkeypatch.setattr(chunked, "chunk_limits", lambda *_: ChunkLimits(rows, rows, rows))


def count_scored_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list to which each pass over a chunk's logits adds the chunk's number of rows."""
    scored: list[int] = []
    score = chunked.ChunkedHead.score

    def counted(head: chunked.ChunkedHead, rows: slice, **options: bool) -> Any:
        scored.append(rows.stop - rows.start)
        return score(head, rows, **options)

    monkeypatch.setattr(chunked.ChunkedHead, "score", counted)
    return scored


def allowed_error(naive_error: float, dtype: torch.dtype) -> float:
    """The error that an op may have if the naive one in the same dtype has `naive_error`.

    In fp32 both round only the last digits, each in its own order, so the op may be off by more.
    """
    return max(2.0 * naive_error, 3e-7) if dtype == torch.float32 else naive_error
