"""Losses of single answers, each of which is known to be desirable or undesirable."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dpofast_kernels.preference.loss import PreferenceLoss


@dataclass(frozen=True)
class UnpairedLoss(PreferenceLoss):
    """weight * (1 - sigmoid(beta * (r - z))), r being an answer's log-ratio; z - r if undesirable.

    Attributes:
        name: name in the registry.
        takes_z: whether log-ratios are compared with z. Without, z is 0.
        desirable_weight: factor of the losses of desirable answers, at least 0.
        undesirable_weight: factor of the losses of undesirable answers, at least 0.

    Raises:
        TypeError: an option is not a number.
        ValueError: an option is out of range.
    """

    takes_z: ClassVar[bool]
    option_names: ClassVar[tuple[str, ...]] = ("desirable_weight", "undesirable_weight")

    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("desirable_weight", "undesirable_weight"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0.0):
                raise ValueError(f"{name} is {value}, expected a finite number of at least 0.")
        if not (self.desirable_weight or self.undesirable_weight):
            raise ValueError(
                "desirable_weight and undesirable_weight are both 0, so there is nothing to learn."
            )

    def sequence_loss(
        self,
        logratios: Tensor,  # [S]
        is_desirable: Tensor,  # [S]
        z: Tensor,  # []
        weights: Tensor | None = None,  # [S]
    ) -> tuple[Tensor, Tensor]:
        """Loss of each answer and its derivative; autograd can differentiate the loss, too.

        Args:
            logratios: [S] fp64, summed log-prob of the policy minus the reference's, in nats.
            is_desirable: [S] bool.
            z: [] fp64, the log-ratio that answers are compared with, in nats, without gradient;
                ignored by a loss that takes none.
            weights: [S] fp64, factor of each answer's loss; None for 1.

        Returns:
            Loss and d loss / d logratios: [S] each.
        """
        distances = logratios - z if self.takes_z else logratios  # [S]
        x = self.beta * torch.where(is_desirable, distances, -distances)
        factors = self._factors(is_desirable)  # [S]
        if weights is not None:
            factors = factors * weights
        # 1 - sigmoid(x) would round to 0 beyond x = 37.
        loss, rest = torch.sigmoid(-x), torch.sigmoid(x)
        slopes = self.beta * factors * loss * rest
        return factors * loss, torch.where(is_desirable, -slopes, slopes)

    def _factors(self, is_desirable: Tensor) -> Tensor:
        """[S] fp64: the loss's own weight of each answer."""
        factors = torch.full(
            is_desirable.shape,
            self.undesirable_weight,
            dtype=torch.float64,
            device=is_desirable.device,
        )
        return factors.masked_fill_(is_desirable, self.desirable_weight)


@dataclass(frozen=True)
class KTOLoss(UnpairedLoss):
    """Kahneman-Tversky optimization: answers are compared with z, an estimate of the KL divergence.

    z is the mean log-ratio of answers to other prompts than their own, or 0 if that is below 0.

    Source: arXiv:2402.01306, eq. 8.
    """

    name: ClassVar[str] = "kto"
    takes_z: ClassVar[bool] = True


@dataclass(frozen=True)
class APOZeroUnpairedLoss(UnpairedLoss):
    """The two terms of `APOZeroLoss`, each for answers of its own: KTO with z = 0.

    Source: arXiv:2408.06266, eq. 7.
    """

    name: ClassVar[str] = "apo_zero_unpaired"
    takes_z: ClassVar[bool] = False


UNPAIRED_LOSSES: dict[str, type[UnpairedLoss]] = {
    loss.name: loss for loss in (KTOLoss, APOZeroUnpairedLoss)
}


def make_unpaired_loss(
    name: str,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> UnpairedLoss:
    """Make a loss of single answers by its name; docs/losses.md has the formulas.

    Args:
        name: "kto" or "apo_zero_unpaired".
        beta: strength of the pull towards the reference, above 0.
        desirable_weight, undesirable_weight: factors of the losses of desirable and of undesirable
            answers, at least 0 and not both 0.

    Raises:
        TypeError: an option is not a number.
        ValueError: the name is unknown, or an option is out of range.

    Example:
        >>> import torch
        >>> from dpofast_kernels import make_unpaired_loss
        >>> loss = make_unpaired_loss("kto", beta=0.1)
        >>> logratios, z = torch.zeros(2, dtype=torch.float64), torch.zeros(())
        >>> value, slope = loss.sequence_loss(logratios, torch.tensor([True, False]), z)
        >>> value.tolist(), slope.tolist()  # 1/2 each, -beta/4 and beta/4
        ([0.5, 0.5], [-0.025, 0.025])
    """
    if not isinstance(name, str) or name not in UNPAIRED_LOSSES:
        raise ValueError(
            f"Unknown loss {name!r} of single answers, expected {' or '.join(UNPAIRED_LOSSES)}."
        )
    return UNPAIRED_LOSSES[name](
        beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight
    )
