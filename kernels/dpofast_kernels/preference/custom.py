"""A pair loss that a user writes as a function; autograd derives it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dpofast_kernels.preference.loss import PairLoss, PreferenceLoss

# (chosen log-ratios [P] fp64, rejected log-ratios [P] fp64, lengths [P, 2] int64) -> losses [P]
PairFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


class NotAPairLossError(ValueError):
    """A function that gives no loss for each pair; says what it does instead."""


@dataclass(frozen=True, kw_only=True, repr=False)
class FunctionLoss(PreferenceLoss):
    """A loss given as a function of log-ratios.

    Attributes:
        function: (chosen log-ratios [P] fp64, rejected log-ratios [P] fp64, lengths [P, 2] int64)
            -> losses [P] fp64 of the pairs. It must be differentiable.

    Raises:
        TypeError: the function can't be called, or beta isn't a number.
        ValueError: beta is out of range, or there is a label_smoothing.
    """

    name: ClassVar[str] = "custom"

    function: PairFunction

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.function):
            raise TypeError(f"function is {self.function!r}, expected a function.")

    def __repr__(self) -> str:
        name = function_name(self.function)
        return f"{type(self).__name__}(beta={self.beta}, function={name})"


@dataclass(frozen=True, kw_only=True, repr=False)
class CustomLoss(FunctionLoss, PairLoss):
    """A loss given as a function whose pairs don't depend on each other.

    See `make_custom_loss`, which also checks it.
    """

    def pair_loss(
        self, chosen_logratios: Tensor, rejected_logratios: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The head calls this inside an autograd function, where nothing is recorded. Clones are
        # leaves of a graph of their own, even in inference mode.
        device = chosen_logratios.device.type
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device, enabled=False),
        ):
            chosen = chosen_logratios.detach().clone().requires_grad_()
            rejected = rejected_logratios.detach().clone().requires_grad_()
            losses = self._call(chosen, rejected, lengths.clone())
            slopes = _derivatives(losses, chosen, rejected)
        if torch.is_grad_enabled() and chosen_logratios.requires_grad:
            losses = self._call(chosen_logratios, rejected_logratios, lengths)
        else:
            losses = losses.detach()
        return losses, *slopes

    def _call(self, chosen: Tensor, rejected: Tensor, lengths: Tensor) -> Tensor:
        return checked_losses(self.function(chosen, rejected, lengths), chosen)


def checked_losses(losses: object, like: Tensor) -> Tensor:
    """What a user's function returned.

    Args:
        losses: its result.
        like: [P], a log-ratio of each pair.

    Raises:
        NotAPairLossError: it isn't a tensor like the log-ratios.
    """
    if not isinstance(losses, Tensor):
        raise NotAPairLossError(
            f"it returned a {type(losses).__name__}, expected a tensor with the loss of each pair."
        )
    if losses.shape != like.shape or losses.dtype != like.dtype:
        raise NotAPairLossError(
            f"it returned {list(losses.shape)} {losses.dtype} for {len(like)} pairs, expected "
            f"{list(like.shape)} {like.dtype}: the loss of each pair, neither summed nor averaged "
            "nor cast."
        )
    return losses


def function_name(function: PairFunction) -> str:
    """The name of a function, or of the class of another callable object."""
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _derivatives(losses: Tensor, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    if not losses.requires_grad:
        raise NotAPairLossError(
            "its result has no gradient: compute it from the log-ratios with differentiable "
            "operations of PyTorch, without detach(), item() or no_grad()."
        )
    slopes = torch.autograd.grad(losses.sum(), (chosen, rejected), materialize_grads=True)
    return slopes[0], slopes[1]
