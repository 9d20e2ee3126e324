"""Losses of mean log-probs per token with a margin: SimPO and AlphaPO."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dpofast_kernels.preference.loss import SmoothedLoss, along_mean_difference
from dpofast_kernels.preference.sigmoid import logistic

# Beyond this exponent, AlphaPO's reward is constant, so that float32 holds it.
LARGEST_EXPONENT = 80.0


@dataclass(frozen=True)
class SimPOLoss(SmoothedLoss):
    """The sigmoid loss of z = beta (chosen - rejected mean log-prob per token) - gamma.

    Source: arXiv:2405.14734, eq. 6.

    Attributes:
        simpo_gamma: gamma, the margin that is aimed at.
    """

    name: ClassVar[str] = "simpo"
    reference_free: ClassVar[bool] = True
    rewards_per_token: ClassVar[bool] = True
    option_names: ClassVar[tuple[str, ...]] = ("simpo_gamma",)

    simpo_gamma: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.simpo_gamma):
            raise ValueError(f"simpo_gamma is {self.simpo_gamma}, expected a finite number.")

    def smoothed_loss(
        self,
        chosen_logratios: Tensor,
        rejected_logratios: Tensor,
        lengths: Tensor,
        smoothing: float | Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens = lengths.to(chosen_logratios)  # [P, 2]
        chosen_reward, chosen_slope = self._reward(chosen_logratios / tokens[:, 0])  # [P]
        rejected_reward, rejected_slope = self._reward(rejected_logratios / tokens[:, 1])  # [P]
        margins = self.beta * (chosen_reward - rejected_reward) - self.simpo_gamma
        loss, slope = logistic(margins, smoothing)
        slope = self.beta * slope
        return loss, slope * chosen_slope / tokens[:, 0], -slope * rejected_slope / tokens[:, 1]

    def _reward(self, mean_logps: Tensor) -> tuple[Tensor, Tensor]:
        """[P] each: the reward of an answer over beta, and its slope."""
        return mean_logps, torch.ones_like(mean_logps)

    def direction(self, lengths: Tensor) -> Tensor | None:
        return along_mean_difference(lengths)


@dataclass(frozen=True)
class AlphaPOLoss(SimPOLoss):
    """SimPO's loss with the reward (1 - p^-alpha) / alpha in place of log p.

    p is the geometric mean of an answer's token probabilities. With alpha = 0, this is SimPO. The
    exponent -alpha log p is clamped at 80.

    Source: arXiv:2501.03884, eq. 6.

    Attributes:
        simpo_gamma: gamma, the margin that is aimed at.
        alpha: alpha, which bends the reward.
    """

    name: ClassVar[str] = "alphapo"
    option_names: ClassVar[tuple[str, ...]] = ("simpo_gamma", "alpha")

    alpha: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha is {self.alpha}, expected a finite number.")

    def _reward(self, mean_logps: Tensor) -> tuple[Tensor, Tensor]:
        if not self.alpha:
            return super()._reward(mean_logps)
        exponents = -self.alpha * mean_logps
        clamped = exponents.clamp(max=LARGEST_EXPONENT)
        slopes = torch.where(exponents <= LARGEST_EXPONENT, torch.exp(clamped), 0.0)
        return -torch.expm1(clamped) / self.alpha, slopes

    def direction(self, lengths: Tensor) -> Tensor | None:
        return None if self.alpha else super().direction(lengths)
