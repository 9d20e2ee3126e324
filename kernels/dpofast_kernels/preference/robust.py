"""Loss of provably robust DPO: DPO's loss without the bias of swapped labels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dpofast_kernels.preference.loss import SmoothedLoss, along_difference, same_for_all


@dataclass(frozen=True)
class RobustLoss(SmoothedLoss):
    """[-(1 - e) log sigmoid(z) + e log sigmoid(-z)] / (1 - 2e) with DPO's margin z.

    If a share e of the labels is swapped at random, its expectation is DPO's loss on the true
    labels. It has no lower bound for e > 0.

    Source: arXiv:2403.00409.
    """

    name: ClassVar[str] = "robust"
    takes_divergence: ClassVar[bool] = True

    def smoothed_loss(
        self,
        chosen_logratios: Tensor,
        rejected_logratios: Tensor,
        lengths: Tensor,
        smoothing: float | Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        margins = self.beta * (chosen_logratios - rejected_logratios)  # [P]
        # The weights of the label as it is, and of its opposite.
        own = (1.0 - smoothing) / (1.0 - 2.0 * smoothing)
        other = smoothing / (1.0 - 2.0 * smoothing)
        loss = other * F.logsigmoid(-margins) - own * F.logsigmoid(margins)
        slope = -self.beta * (own * torch.sigmoid(-margins) + other * torch.sigmoid(margins))
        return loss, slope, -slope

    def first_value(self, lengths: Tensor) -> Tensor:
        return same_for_all(math.log(2.0), lengths)

    def direction(self, lengths: Tensor) -> Tensor:
        return along_difference(lengths)
