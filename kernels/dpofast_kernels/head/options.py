"""Options of the head's ops, and the result of the pair loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

# Part of a reference's identity. Raise it whenever a log-prob changes by more than rounding: stored
# reference log-probs are then computed again.
HEAD_VERSION = 1

BACKENDS = ("auto", "torch", "triton", "triton_fused", "naive")


@dataclass(frozen=True, eq=False)
class HeadOptions:
    """What a model does to its logits, and how the op runs.

    The logits are softcap(logit_scale (x W^T + bias)) / temperature, where softcap(z) is
    cap tanh(z / cap).

    Attributes:
        bias: [V], in the weight's dtype. It gets a gradient, too.
        softcap: cap of the logits, above 0, or None.
        logit_scale: factor of the logits, applied before the cap.
        temperature: divisor of the logits, applied last.
        weight_grad: [V, H] fp32 (fp64 for fp64 weights). If given, the backward adds the weight's
            gradient, times the upstream gradient, to this buffer, and the weight itself gets none.
            So code that waits for the weight's `.grad`, such as DDP's hooks, never sees one. A
            backward adds to the buffer whenever the weight requires a gradient, even if only the
            gradient of the hidden states is asked for. `linear_pair_loss` first sums over its own
            rows in another buffer of the same size, because the upstream gradient comes last.
        workspace_bytes: the most bytes that a chunk's logits may take. A chunk has at least one
            row, on a CPU at least sixteen. None is 1 GB, on a CPU 160 MiB: larger chunks are no
            faster there.
        backend: "auto" is "triton" on CUDA and ROCm, "torch" elsewhere. "torch" is tiled PyTorch.
            "triton" uses the library's matrix product and one kernel over each chunk of logits.
            "triton_fused" is a matrix product that never writes logits, for bf16 and fp16 only.
            "naive" computes all logits at once, for comparison.

    Raises:
        TypeError: bias or weight_grad is not a tensor.
        ValueError: an option is out of range, or the back end is unknown.
    """

    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0
    weight_grad: Tensor | None = None
    workspace_bytes: int | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("softcap", "logit_scale", "temperature"):
            value = getattr(self, name)
            if value is None and name == "softcap":
                continue
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (is_number and math.isfinite(value) and value > 0.0):
                raise ValueError(f"{name} is {value!r}, expected a finite number above 0.")
        for name in ("bias", "weight_grad"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Tensor):
                raise TypeError(f"{name} is a {type(value).__name__}, expected a tensor.")
        limit = self.workspace_bytes
        is_whole = isinstance(limit, int) and not isinstance(limit, bool)
        if limit is not None and not (is_whole and limit >= 1):
            raise ValueError(f"workspace_bytes is {limit!r}, expected a whole number above 0.")
        if self.backend not in BACKENDS:
            raise ValueError(
                f"Unknown backend {self.backend!r}, expected one of {', '.join(BACKENDS)}."
            )


@dataclass(frozen=True, eq=False)
class PairLossOutput:
    """Result of `linear_pair_loss`.

    Attributes:
        loss: [] fp64, sum over pairs; differentiable.
        logps: [2P] fp64, summed log-probs of the policy in nats; without gradient.
        metrics: [8, P] fp64, the values of `pair_metrics` in the order of `METRIC_NAMES`; without
            gradient.
    """

    loss: Tensor
    logps: Tensor
    metrics: Tensor
