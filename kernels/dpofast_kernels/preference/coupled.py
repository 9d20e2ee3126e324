"""Base class of losses that couple pairs, their weighted sums, and those of a user's function.

A pair's derivatives depend on the log-probs of all pairs that are trained together. So these must
be known first: a forward pass finds them, `losses_and_slopes` turns them into derivatives, and
`linear_pair_loss` trains with these as coefficients of its sequences (`PairExtras`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dpofast_kernels.preference.custom import (
    FunctionLoss,
    NotAPairLossError,
    PairFunction,
    checked_losses,
)
from dpofast_kernels.preference.loss import PairLoss, PreferenceLoss, ZeroLoss
from dpofast_kernels.preference.mixture import WeightedSum


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
class CoupledMixture(WeightedSum[PreferenceLoss], CoupledLoss):
    """A `WeightedSum` of losses, some of which couple pairs."""

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


@dataclass(frozen=True)
class CoupledFunction:
    """Says of a user's function that the loss of a pair depends on the other pairs, too.

    Attributes:
        function: as in `make_coupled_custom_loss`.
    """

    function: PairFunction


@dataclass(frozen=True, kw_only=True, repr=False)
class CoupledCustomLoss(FunctionLoss, CoupledLoss):
    """A coupled loss given as a function; see `make_coupled_custom_loss`, which also checks it."""

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
