"""What the head is told, and what it gives back."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

# Part of a reference's identity: raised whenever a log-prob could change by anything but rounding,
# so that stored log-probs are made again.
HEAD_VERSION = 1

BACKENDS = ("auto", "torch", "triton", "triton_fused", "naive")


@dataclass(frozen=True, eq=False)
class HeadOptions:
    """What a model does to its logits, and how the op is to run.

    The logits are softcap(logit_scale (x W^T + bias)) / temperature, where softcap(z) is
    cap tanh(z / cap).

    Attributes:
        bias: [V], in the weight's dtype; gets a gradient, too.
        softcap: above 0, or None.
        logit_scale: what logits are multiplied with.
        temperature: what they are divided by at last.
        weight_grad: [V, H] fp32 (fp64 for fp64 weights). If given, the backward adds the weight's
            gradient, times the upstream gradient, to this buffer, and the weight itself gets none:
            nothing that waits for its `.grad`, such as DDP's hooks, will see one. A backward adds
            to it whenever the weight requires a gradient, also where only that of the hidden states
            is asked for. `linear_pair_loss` sums over its own rows in memory of the same size
            first, as the upstream gradient comes last.
        workspace_bytes: that a chunk's logits may take; a row is the least. By default 1 GB, and on
            a CPU, where larger chunks are no faster, 160 MiB, and sixteen rows are the least.
        backend: "auto" is Triton on CUDA and ROCm, tiled PyTorch elsewhere. "triton" lets the
            library multiply and runs one kernel over each chunk of logits; "triton_fused" is a
            product of its own, bf16 and fp16 alone, that never writes logits. "naive" makes all
            logits at once and is there to compare with.

    Raises:
        TypeError: bias or weight_grad is no tensor.
        ValueError: an option out of range, or an unknown backend.
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
    """What `linear_pair_loss` returns.

    Attributes:
        loss: [] fp64, the sum over pairs; differentiable.
        logps: [2P] fp64, summed log-probs of the policy in nats; without gradient.
        metrics: [8, P] fp64, those of `pair_metrics` in the order of `METRIC_NAMES`; likewise.
    """

    loss: Tensor
    logps: Tensor
    metrics: Tensor
