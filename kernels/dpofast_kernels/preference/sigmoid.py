"""The losses of DPO and of length-normalised DPO. With label smoothing, DPO is conservative."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dpofast_kernels.preference.loss import (
    SmoothedLoss,
    along_difference,
    along_mean_difference,
    same_for_all,
)


@dataclass(frozen=True)
class SigmoidLoss(SmoothedLoss):
    """-(1 - e) log sigmoid(z) - e log sigmoid(-z) with z = beta (chosen - rejected log-ratio).

    Source: arXiv:2305.18290, eq. 7. With label_smoothing e > 0 it is cDPO: E. Mitchell, "A note on
    DPO with noisy preferences and relationship to IPO" (2023), eq. 3.
    """

    name: ClassVar[str] = "sigmoid"
    takes_divergence: ClassVar[bool] = True

    def smoothed_loss(
        self,
        chosen_logratios: Tensor,
        rejected_logratios: Tensor,
        lengths: Tensor,
        smoothing: float | Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, slope = logistic(self.beta * (chosen_logratios - rejected_logratios), smoothing)
        return loss, self.beta * slope, -self.beta * slope

    def first_value(self, lengths: Tensor) -> Tensor:
        return same_for_all(math.log(2.0), lengths)

    def direction(self, lengths: Tensor) -> Tensor:
        return along_difference(lengths)


@dataclass(frozen=True)
class SigmoidNormLoss(SmoothedLoss):
    """The sigmoid loss of z = beta (chosen - rejected mean log-ratio per token).

    Source: length-normalised DPO of Tulu 3, arXiv:2411.15124.
    """

    name: ClassVar[str] = "sigmoid_norm"
    takes_divergence: ClassVar[bool] = True

    def smoothed_loss(
        self,
        chosen_logratios: Tensor,
        rejected_logratios: Tensor,
        lengths: Tensor,
        smoothing: float | Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens = lengths.to(chosen_logratios)  # [P, 2]
        mean_margins = chosen_logratios / tokens[:, 0] - rejected_logratios / tokens[:, 1]  # [P]
        loss, slope = logistic(self.beta * mean_margins, smoothing)
        return loss, self.beta * slope / tokens[:, 0], -self.beta * slope / tokens[:, 1]

    def first_value(self, lengths: Tensor) -> Tensor:
        return same_for_all(math.log(2.0), lengths)

    def direction(self, lengths: Tensor) -> Tensor:
        return along_mean_difference(lengths)


def logistic(margins: Tensor, smoothing: float | Tensor) -> tuple[Tensor, Tensor]:
    """[P] each: the loss of margins z, with smoothed labels, and d loss / d z."""
    loss = -(1.0 - smoothing) * F.logsigmoid(margins)
    slope = -(1.0 - smoothing) * torch.sigmoid(-margins)
    if isinstance(smoothing, Tensor) or smoothing:
        loss = loss - smoothing * F.logsigmoid(-margins)
        slope = slope + smoothing * torch.sigmoid(margins)
    return loss, slope
