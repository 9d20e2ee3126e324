"""Autograd functions around the chunked head.

Both functions cast the inputs themselves. So their gradients go from fp32 straight to the inputs'
own dtypes, without being rounded to the compute dtype in between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpofast_kernels.head.cast import scale_and_cast
from dpofast_kernels.head.chunked import NOTHING, ChunkedHead, Gradients, Wanted
from dpofast_kernels.head.one_pass import one_pass
from dpofast_kernels.head.options import HeadOptions, PairLossOutput
from dpofast_kernels.head.pairs import Pairs
from dpofast_kernels.head.rescale import rescale
from dpofast_kernels.head.singles import Singles


@dataclass(frozen=True, eq=False)
class HeadCall:
    """Arguments of one call of an op, apart from its differentiable inputs.

    Attributes:
        labels: [N] int64.
        options: options of the op.
        dtype: dtype to compute in.
        backend: "torch", "triton" or "triton_fused".
        grad_enabled: whether autograd records this call.
        pairs: pairs or single answers, and their loss; None for per-token log-probs.
        statistics: names of the statistics that are wanted, see `STATISTICS`.
    """

    labels: Tensor
    options: HeadOptions
    dtype: torch.dtype
    backend: str
    grad_enabled: bool
    pairs: Pairs | Singles | None = None
    statistics: tuple[str, ...] = ()

    @property
    def upstream(self) -> float:
        """The upstream gradient of the loss that gradients are made with."""
        return 1.0 if self.options.upstream is None else self.options.upstream

    def wanted(self, needs_grad: tuple[bool, ...], rounds: bool) -> Wanted:
        """Which gradients to make.

        Args:
            needs_grad: whether hidden states, weight and bias need one.
            rounds: whether the gradients contain the upstream gradient.
        """
        rounds = rounds and self.options.weight_grad is None
        hidden_states, weight, bias = needs_grad[:3]
        return Wanted(hidden_states, weight, bias, rounds)

    def head(self, hidden_states: Tensor, weight: Tensor, wanted: Wanted) -> ChunkedHead:
        """The chunked head of this call."""
        # A weight that autocast casts gets its gradient in its own, wider dtype. In fp32 or fp64
        # nothing is rounded.
        is_narrow = weight.dtype == self.dtype and self.dtype.itemsize < torch.float32.itemsize
        wanted = replace(wanted, rounded=wanted.rounded and is_narrow)
        return ChunkedHead(
            hidden_states,
            weight,
            self.labels,
            self.options,
            self.dtype,
            self.backend,
            wanted,
            self.statistics,
        )


def forward_only(
    hidden_states: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    call: HeadCall,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-token log-probs and log-sum-exps, [N] each, and statistics [K, N], without gradient."""
    with torch.autocast(hidden_states.device.type, enabled=False):
        head = call.head(hidden_states, weight, NOTHING)
        scored = [head.score(rows) for rows in head.row_chunks(0, len(call.labels))]
    # Without rows there are no chunks, and cat needs one tensor at least.
    nothing = hidden_states.new_empty(0, dtype=head.dtype)
    logps = [nothing, *(chunk.per_token_logps for chunk in scored)]
    logsumexps = [nothing, *(chunk.logsumexps for chunk in scored if chunk.logsumexps is not None)]
    statistics = [nothing.new_empty(len(call.statistics), 0)]
    statistics += [chunk.statistics for chunk in scored if chunk.statistics is not None]
    return torch.cat(logps), torch.cat(logsumexps), torch.cat(statistics, 1)


class LinearLogps(torch.autograd.Function):
    """Per-token log-probs; the backward computes the logits again, for any upstream gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        call: HeadCall,
    ) -> Tensor:
        ctx.call = call
        # Autograd complains if a saved tensor is overwritten before the backward. The labels are
        # saved for that reason only.
        ctx.save_for_backward(hidden_states, weight, bias, call.labels)
        return forward_only(hidden_states, weight, call)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_per_token_logps: Tensor) -> tuple[Tensor | None, ...]:
        call: HeadCall = ctx.call
        hidden_states, weight, bias, _ = ctx.saved_tensors
        with torch.autocast(hidden_states.device.type, enabled=False):
            wanted = call.wanted(ctx.needs_input_grad, rounds=True)
            head = call.head(hidden_states, weight, wanted)
            gradients = head.new_gradients(call.options.weight_grad)
            for rows in head.row_chunks(0, len(call.labels)):
                head.add_gradients(gradients, rows, head.score(rows), d_per_token_logps[rows])
            gradients.fill_empty()
        if call.options.weight_grad is not None:
            gradients.weight = None  # it was added to the caller's buffer
        return *_as_inputs(gradients, call.backend, hidden_states, weight, bias, None), None


class LinearPairLoss(torch.autograd.Function):
    """The fields of a PairLossOutput; the forward computes the gradients, too.

    Gradients are made with the upstream gradient that the call expects, and stay in fp32 until the
    backward multiplies them by the real one divided by that. The exception is the gradient of a
    bf16 weight, which may be rounded before if `HeadOptions.upstream` is given.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        call: HeadCall,
    ) -> tuple[Tensor | None, ...]:
        ctx.call = call
        # As in LinearLogps, the labels are saved only to notice that they were overwritten.
        ctx.save_for_backward(hidden_states, weight, bias, call.labels)
        # needs_input_grad is true even under no_grad, where nobody will ask for the gradients.
        needs_grad = tuple(needed and call.grad_enabled for needed in ctx.needs_input_grad)
        output, ctx.gradients = _run_one_pass(call, hidden_states, weight, needs_grad)
        loss, *others = (getattr(output, field.name) for field in fields(output))
        ctx.mark_non_differentiable(*(other for other in others if other is not None))
        return loss, *others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        call: HeadCall = ctx.call
        hidden_states, weight, bias, _ = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            # An earlier backward of a retained graph scaled the gradients in place and gave them
            # away. So they are computed once more.
            gradients = _run_one_pass(call, hidden_states, weight, ctx.needs_input_grad)[-1]
        # Exactly 1 in fp32 if the call expected the right upstream gradient.
        factor = d_loss / call.upstream
        if call.options.weight_grad is not None and gradients.weight is not None:
            call.options.weight_grad.add_(rescale(gradients.weight, factor, call.backend))
            gradients.weight = None
        return *_as_inputs(gradients, call.backend, hidden_states, weight, bias, factor), None


def _run_one_pass(
    call: HeadCall, hidden_states: Tensor, weight: Tensor, needs_grad: tuple[bool, ...]
) -> tuple[PairLossOutput, Gradients | None]:
    assert call.pairs is not None
    # In fp16, a loss scale that isn't part of `upstream` keeps small gradients from vanishing. So
    # they stay in fp32 until they are multiplied by it.
    rounds = call.options.upstream is not None and call.dtype == torch.bfloat16
    wanted = call.wanted(needs_grad, rounds)
    with torch.autocast(hidden_states.device.type, enabled=False):
        return one_pass(call.head(hidden_states, weight, wanted), call.pairs, call.upstream)


def _as_inputs(
    gradients: Gradients,
    backend: str,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factor: Tensor | None,  # []
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Each gradient times `factor` (None is 1), in its input's dtype: one pass and one rounding."""

    def cast(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
        if gradient is None or like is None:
            return None
        if factor is None:
            return gradient.to(like.dtype)
        if gradient.dtype == like.dtype:
            return rescale(gradient, factor, backend)
        out = torch.empty_like(gradient, dtype=like.dtype)
        return scale_and_cast(gradient, factor, out, backend)

    return (
        cast(gradients.hidden_states, hidden_states),
        cast(gradients.weight, weight),
        cast(gradients.bias, bias),
    )


# PyTorch gives `Function.apply` no type.
apply_linear_logps: Callable[[Tensor, Tensor, Tensor | None, HeadCall], Tensor] = LinearLogps.apply
apply_linear_pair_loss: Callable[[Tensor, Tensor, Tensor | None, HeadCall], tuple[Any, ...]] = (
    LinearPairLoss.apply
)
