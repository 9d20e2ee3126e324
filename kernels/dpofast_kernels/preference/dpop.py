"""Loss of DPO-Positive (DPOP), which keeps chosen answers from becoming less probable."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dpofast_kernels.preference.loss import PairLoss, same_for_all


@dataclass(frozen=True)
class DPOPLoss(PairLoss):
    """-log sigmoid(beta (a - b - lambda max(0, -a))) with chosen and rejected log-ratio a and b.

    Source: arXiv:2402.13228.

    Attributes:
        dpop_lambda: lambda, at least 0; weight of the penalty while a is below 0.
    """

    name: ClassVar[str] = "dpop"
    option_names: ClassVar[tuple[str, ...]] = ("dpop_lambda",)

    dpop_lambda: float = 50.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.dpop_lambda) and self.dpop_lambda >= 0.0):
            raise ValueError(
                f"dpop_lambda is {self.dpop_lambda}, expected a finite number of at least 0."
            )

    def pair_loss(
        self, chosen_logratios: Tensor, rejected_logratios: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        penalties = self.dpop_lambda * torch.relu(-chosen_logratios)  # [P]
        margins = self.beta * (chosen_logratios - rejected_logratios - penalties)  # [P]
        slope = -self.beta * torch.sigmoid(-margins)
        # At the kink the penalty's slope is 0, as PyTorch defines the derivative of relu.
        is_penalised = (chosen_logratios < 0.0).to(slope.dtype)
        return -F.logsigmoid(margins), slope * (1.0 + self.dpop_lambda * is_penalised), -slope

    def first_value(self, lengths: Tensor) -> Tensor:
        return same_for_all(math.log(2.0), lengths)
