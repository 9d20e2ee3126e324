"""Base class of losses that couple pairs, their weighted sums, and those of a user's function.

A pair's derivatives depend on the log-probs of all pairs that are trained together. So these must
be known first: a forward pass finds them, `losses_and_slopes` turns them into derivatives, and
`linear_pair_loss` trains with these as coefficients of its sequences (`PairExtras`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from dpofast_kernels.preference.custom import (
    NotAPairLossError,
    PairFunction,
    checked_losses,
    function_name,
)
from dpofast_kernels.preference.loss import PairLoss, PreferenceLoss, ZeroLoss
from dpofast_kernels.preference.mixture import check_mixture


@dataclass(frozen=True)
class LinearLoss(ZeroLoss):
    """No loss of pairs, as `ZeroLoss`, but the metrics compare with the reference."""

    reference_free: ClassVar[bool] = False


@dataclass(frozen=True)
class CoupledLoss(PreferenceLoss):
    """A loss of all pairs of an optimizer step together; autograd derives it, in fp64.

    A subclass defines `losses`.
    """

    @property
    def linear(self) -> PairLoss:
        """The loss of pairs that `linear_pair_loss` takes when the derivatives are known."""
        return LinearLoss(beta=self.beta)

    def losses_and_slopes(
        self,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        ref_chosen_logps: Tensor,
        ref_rejected_logps: Tensor,
        lengths: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = chosen_logps.device.type
        # Clones are leaves of a graph of their own, even in inference mode.
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device, enabled=False),
        ):
            chosen = chosen_logps.detach().clone().requires_grad_()
            rejected = rejected_logps.detach().clone().requires_grad_()
            given = (ref_chosen_logps.clone(), ref_rejected_logps.clone(), lengths.clone())
            losses = self.losses(chosen, rejected, *given)
            if not losses.requires_grad:
                raise NotAPairLossError(
                    "its result has no gradient: compute it from the log-ratios with "
                    "differentiable operations of PyTorch, without detach(), item() or no_grad()."
                )
            d_chosen, d_rejected = torch.autograd.grad(
                losses.sum(), (chosen, rejected), materialize_grads=True
            )
        return losses.detach(), d_chosen, d_rejected


@dataclass(frozen=True, kw_only=True)
class CoupledMixture(CoupledLoss):
    """The sum of weight x loss over several losses of the same beta, some of which couple pairs.

    Attributes:
        parts: the losses. label_smoothing is that of the parts that have it.
        weights: their weights, finite and at least 0; one of them is above 0.

    Raises:
        ValueError: as in `MixtureLoss`.
    """

    name: ClassVar[str] = "mixture"
    takes_label_smoothing: ClassVar[bool] = True

    parts: tuple[PreferenceLoss, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mixture(self.parts, self.weights, self.beta)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parts."""
        return tuple(name for part in self.parts for name in part.names)

    def with_beta(self, beta: float) -> Self:
        return replace(self, beta=beta, parts=tuple(part.with_beta(beta) for part in self.parts))

    def losses(
        self,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        ref_chosen_logps: Tensor,
        ref_rejected_logps: Tensor,
        lengths: Tensor,
    ) -> Tensor:
        inputs = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, lengths)
        return torch.stack([part.losses(*inputs) * w for part, w in self._weighted()]).sum(0)

    def losses_and_slopes(
        self,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        ref_chosen_logps: Tensor,
        ref_rejected_logps: Tensor,
        lengths: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, lengths)
        # Each part's own slopes, so that a part is trained as it is by itself.
        found = [torch.stack(part.losses_and_slopes(*inputs)) * w for part, w in self._weighted()]
        losses, d_chosen, d_rejected = torch.stack(found).sum(0)  # [3, P]
        return losses, d_chosen, d_rejected

    def first_value(self, lengths: Tensor) -> Tensor:
        values = [part.first_value(lengths) * weight for part, weight in self._weighted()]
        return torch.stack(values).sum(0)

    def _weighted(self) -> list[tuple[PreferenceLoss, float]]:
        """The parts with their weights, without those of weight 0: 0 times infinity is NaN."""
        return [each for each in zip(self.parts, self.weights, strict=True) if each[1]]


@dataclass(frozen=True)
class CoupledFunction:
    """Says of a user's function that the loss of a pair depends on the other pairs, too.

    Attributes:
        function: as in `make_coupled_custom_loss`.
    """

    function: PairFunction


@dataclass(frozen=True, kw_only=True, repr=False)
class CoupledCustomLoss(CoupledLoss):
    """A coupled loss given as a function; see `make_coupled_custom_loss`, which also checks it.

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
        return f"CoupledCustomLoss(beta={self.beta}, function={function_name(self.function)})"

    def losses(
        self,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        ref_chosen_logps: Tensor,
        ref_rejected_logps: Tensor,
        lengths: Tensor,
    ) -> Tensor:
        chosen, rejected = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
        return checked_losses(self.function(chosen, rejected, lengths), chosen)
