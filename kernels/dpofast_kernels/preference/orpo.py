"""The odds ratio part of odds ratio preference optimization (ORPO)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dpofast_kernels.preference.loss import PairLoss

# The odds of a certain answer are infinite. Nearer to certainty than this, they are constant.
SMALLEST_LOSS = 2.0**-40


@dataclass(frozen=True)
class ORPOLoss(PairLoss):
    """-beta log sigmoid(log odds of chosen - log odds of rejected), odds being p / (1 - p).

    p is the geometric mean of an answer's token probabilities. beta is the paper's lambda, the
    weight of this term. The other term is the likelihood of prompt and chosen answer.

    Source: arXiv:2403.07691, eqs. 6 and 7.
    """

    name: ClassVar[str] = "orpo"
    reference_free: ClassVar[bool] = True
    rewards_per_token: ClassVar[bool] = True

    def pair_loss(
        self, chosen_logratios: Tensor, rejected_logratios: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens = lengths.to(chosen_logratios)  # [P, 2]
        chosen, not_chosen, chosen_slope = _log_odds(chosen_logratios / tokens[:, 0])
        rejected, not_rejected, rejected_slope = _log_odds(rejected_logratios / tokens[:, 1])
        log_odds_ratios = (chosen - not_chosen) - (rejected - not_rejected)
        # The slope of the log odds is 1 / (1 - p). It can be huge where the sigmoid is tiny, so
        # their logarithms are added.
        slopes = F.logsigmoid(-log_odds_ratios)
        d_chosen = -self.beta * torch.exp(slopes - not_chosen) * chosen_slope / tokens[:, 0]
        d_rejected = self.beta * torch.exp(slopes - not_rejected) * rejected_slope / tokens[:, 1]
        return -self.beta * F.logsigmoid(log_odds_ratios), d_chosen, d_rejected


def _log_odds(mean_logps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p and log(1 - p), whose difference is the log odds, and the clamp's slope: [P] each."""
    logps = mean_logps.clamp(max=-SMALLEST_LOSS)
    return logps, _log1mexp(logps), (mean_logps <= -SMALLEST_LOSS).to(logps)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, exact to rounding on both ends."""
    is_near = x > -math.log(2.0)
    # Each branch gets a harmless number where the other one is taken: NaN times 0 is NaN.
    near = torch.log(-torch.expm1(torch.where(is_near, x, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(is_near, -1.0, x)))
    return torch.where(is_near, near, far)
