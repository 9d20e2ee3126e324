"""DiscoPOP: a blend of DPO's loss with an exponential one, found by a language model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dpofast_kernels.preference.loss import PairLoss, along_difference, same_for_all


@dataclass(frozen=True)
class DiscoPOPLoss(PairLoss):
    """(1 - m) (-log sigmoid(z)) + m exp(-z) with m = sigmoid(z / tau) and DPO's margin z.

    exp(-z) alone would overflow for margins far below 0, where m is close to 0. So the product is
    computed as exp(-z + log m).

    Source: arXiv:2406.08414, eq. 5.

    Attributes:
        discopop_tau: tau, above 0. It may be at most 1, or the product would grow without bound.
    """

    name: ClassVar[str] = "discopop"
    takes_divergence: ClassVar[bool] = True
    option_names: ClassVar[tuple[str, ...]] = ("discopop_tau",)

    discopop_tau: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.discopop_tau <= 1.0:
            raise ValueError(
                f"discopop_tau is {self.discopop_tau}, expected a number above 0 and at most 1."
            )

    def pair_loss(
        self, chosen_logratios: Tensor, rejected_logratios: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        margins, tau = self.beta * (chosen_logratios - rejected_logratios), self.discopop_tau
        blend, rest = torch.sigmoid(margins / tau), torch.sigmoid(-margins / tau)  # m, 1 - m
        logistic = -F.logsigmoid(margins)  # [P]
        exponential = torch.exp(F.logsigmoid(margins / tau) - margins)  # [P], times m
        slope = exponential * (rest / tau - 1.0)
        slope = slope - rest * (torch.sigmoid(-margins) + logistic * blend / tau)
        loss = logistic * rest + exponential
        return loss, self.beta * slope, -self.beta * slope

    def first_value(self, lengths: Tensor) -> Tensor:
        return same_for_all(0.5 + 0.5 * math.log(2.0), lengths)

    def direction(self, lengths: Tensor) -> Tensor:
        return along_difference(lengths)
