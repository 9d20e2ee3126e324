"""Options of the head's ops, and the results of those with a loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from dpofast_kernels.preference import PairWeighting

# Version of the log-probs that the head computes, and part of the identity of a stored reference.
# Increase it whenever log-probs change by more than rounding. Log-probs stored under another
# version are computed again.
HEAD_VERSION = 1

# Names of the metrics in `SequenceLossOutput.metrics`, in its order.
SEQUENCE_METRIC_NAMES = ("rewards", "logratios")

BACKENDS = ("auto", "torch", "triton", "triton_fused", "naive")


@dataclass(frozen=True, eq=False)
class HeadOptions:
    """What a model does to its logits, and how the op runs.

    The finished logits are softcap(logit_scale (x W^T + bias)) / temperature, where softcap(z) is
    cap tanh(z / cap).

    Attributes:
        bias: [V], in the weight's dtype. It gets a gradient, too.
        softcap: cap of the logits, above 0, or None.
        logit_scale: factor of the logits, applied before the cap.
        temperature: divisor of the logits, applied last.
        weight_grad: [V, H] fp32 (fp64 for fp64 weights). If given, the backward adds the weight's
            gradient, times the upstream gradient, to this buffer, and autograd gets no gradient for
            the weight. So code that waits for the weight's `.grad`, such as DDP's hooks, never sees
            a gradient. A backward adds to the buffer whenever the weight requires one, even if only
            the gradient of the hidden states is asked for. `linear_pair_loss` needs a second buffer
            of this size, because it sums the gradient before the upstream gradient is known.
        workspace_bytes: the most bytes that a chunk's logits can take. None means the default: see
            docs/kernels.md. Whatever the limit, a chunk has at least one row (sixteen in the CPU's
            "torch" back end).
        upstream: the upstream gradient that the backward of an op with a loss is expected to get,
            such as one over the number of pairs. Gradients are made with it, and the backward only
            multiplies them by the real upstream gradient divided by this one. A single chunk then
            writes the gradient of a bf16 weight in bf16, without a sum in fp32. If the real one
            differs, this gradient is rounded once more. None if nothing is known.
        backend: "auto" is "triton_fused" on CUDA for bf16, "triton" for the rest on CUDA and ROCm,
            "torch" elsewhere. "torch" is tiled PyTorch. "triton" makes each chunk of logits with
            PyTorch's matrix product and works on it with Triton kernels. "triton_fused" multiplies
            in Triton and never writes logits; for bf16 and fp16 only. "naive" computes all logits
            at once, for comparison.

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
    upstream: float | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("softcap", "logit_scale", "temperature", "upstream"):
            value = getattr(self, name)
            if value is None and name in ("softcap", "upstream"):
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
class PairExtras:
    """What `linear_pair_loss` can take beside plain pairs; tensors are on any device.

    Attributes:
        pairs: [P, 2] int64, chosen and rejected sequence of each pair, best passed on the CPU. A
            sequence can be in several pairs or in none. Pairs come in the order of their sequences:
            a pair that has no sequence in common with the pairs before it has later ones than they
            have. None means (0, 1), (2, 3), ..., S being 2P.
        weights: [P] factor of each pair's loss, at least 0; None for 1.
        label_confidence: [P] probability that a pair's chosen answer is the better one, in [0, 1].
            One minus it replaces the loss's label_smoothing. None for the loss's own.
        coefficients: [S] what each nat of a sequence's log-prob adds to the loss; None for 0.
        token_weights: [N] factor of each token's log-prob within its sequence's; None for 1. The
            reference's log-probs are expected to be weighted already.
        weighting: multiplies each pair's loss with WPO's weight, in addition to `weights`; None for
            no such weight. Coefficients aren't weighted.
        statistics: names of `STATISTICS`, whose sums over each sequence are computed, too.
    """

    pairs: Tensor | None = None
    weights: Tensor | None = None
    label_confidence: Tensor | None = None
    coefficients: Tensor | None = None
    token_weights: Tensor | None = None
    weighting: PairWeighting | None = None
    statistics: tuple[str, ...] = ()

    def to(self, device: torch.device | str) -> PairExtras:
        """Copy to a device, without waiting; except the pairs, by which chunks are cut."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if field.name != "pairs" and isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)


NO_EXTRAS = PairExtras()


@dataclass(frozen=True, eq=False)
class PairLossOutput:
    """Result of `linear_pair_loss`.

    Attributes:
        loss: [] fp64, sum over pairs; differentiable.
        logps: [S] fp64, summed log-probs of the policy in nats; without gradient.
        metrics: [8, P] fp64, the values of `pair_metrics` in the order of `METRIC_NAMES`; without
            gradient.
        statistics: [K, S] fp64, sums over each sequence's rows of the statistics that were asked
            for, in that order, each row counting 1 whatever its token weight; without gradient.
            None if none was asked for.
        pair_weights: [P] fp64, WPO's weight of each pair; without gradient. None without weighting.
    """

    loss: Tensor
    logps: Tensor
    metrics: Tensor
    statistics: Tensor | None = None
    pair_weights: Tensor | None = None


@dataclass(frozen=True, eq=False)
class SequenceLossOutput:
    """Result of `linear_sequence_loss`.

    Attributes:
        loss: [] fp64, sum over sequences; differentiable.
        logps: [S] fp64, summed log-probs of the policy in nats; without gradient.
        metrics: [2, S] fp64, beta times the log-ratio of each sequence, and its log-ratio per
            token; without gradient.
    """

    loss: Tensor
    logps: Tensor
    metrics: Tensor


@dataclass(frozen=True, eq=False)
class Answers:
    """What `linear_sequence_loss` has to know about its sequences; tensors are on any device.

    Attributes:
        bounds: [S+1] int64, bounds of the sequences; best passed on the CPU, because chunks are cut
            there. No sequence may be empty.
        ref_logps: [S] summed log-probs of the reference, in nats.
        is_desirable: [S] bool.
        z: [] what the loss compares log-ratios with, in nats; None for 0.
        weights: [S] factor of each sequence's loss, at least 0; None for 1.
    """

    bounds: Tensor
    ref_logps: Tensor
    is_desirable: Tensor
    z: Tensor | None = None
    weights: Tensor | None = None
