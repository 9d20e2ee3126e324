"""Outputs without gradients, from which an overridden `compute_loss` could make a term in vain."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from dpofast.errors import ConfigError
from dpofast_kernels import PairLossOutput


class _Untrained(torch.autograd.Function):
    """Passes a tensor on; a backward pass through the result is an error."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise ConfigError(
            "compute_loss: a term of the loss is made from outputs.logps or outputs.metrics, which "
            "have no gradient, so it wouldn't be trained; put the term into a loss_fn, or detach() "
            "what isn't meant to be trained (see docs/extending.md)."
        )


def untrained(output: PairLossOutput) -> PairLossOutput:
    """The output with log-probs and metrics that no loss can be made from.

    Without this, a term made from them would count in the logged loss, and in no gradient. Where no
    gradients are recorded, the values are just copies.
    """
    anchor = torch.zeros((), requires_grad=True)
    logps: Tensor = _Untrained.apply(output.logps, anchor)  # type: ignore[no-untyped-call]
    metrics: Tensor = _Untrained.apply(output.metrics, anchor)  # type: ignore[no-untyped-call]
    return replace(output, logps=logps, metrics=metrics)
