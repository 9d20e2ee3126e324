"""Outputs without gradients, from which an overridden `compute_loss` could make a term in vain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
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
            "compute_loss: a term of the loss is made from outputs.logps, outputs.metrics or an "
            "output that has no gradient, so it wouldn't be trained; put the term into a loss_fn, "
            "or detach() what isn't meant to be trained (see docs/extending.md)."
        )


def untrained(output: PairLossOutput) -> PairLossOutput:
    """The output with log-probs, metrics and more that no loss can be made from.

    Without this, a term made from them would count in the logged loss, and in no gradient. Where no
    gradients are recorded, the values are just copies.
    """
    anchor = torch.zeros((), requires_grad=True)
    return _changed(output, lambda value: _Untrained.apply(value, anchor))  # type: ignore[no-untyped-call]


def detached(output: PairLossOutput) -> PairLossOutput:
    """The output whose values no backward pass goes through; the loss stays as it is."""
    return _changed(output, Tensor.detach)


def joined(outputs: Sequence[PairLossOutput]) -> PairLossOutput:
    """The output of several micro-batches, all of which have the same fields."""
    loss = torch.stack([each.loss for each in outputs]).sum()
    values = {
        name: torch.cat([getattr(each, name) for each in outputs], -1)
        for name in _given(outputs[0])
    }
    return PairLossOutput(loss, **values)


def _given(output: PairLossOutput) -> list[str]:
    """The fields beside the loss that the output has."""
    names = [item.name for item in fields(output) if item.name != "loss"]
    return [name for name in names if getattr(output, name) is not None]


def _changed(output: PairLossOutput, change: Callable[[Tensor], Tensor]) -> PairLossOutput:
    values: dict[str, Any] = {name: change(getattr(output, name)) for name in _given(output)}
    return replace(output, **values)
