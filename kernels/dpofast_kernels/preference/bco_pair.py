"""Loss of binary classifier optimization (BCO) on pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dpofast_kernels.preference.loss import PairLoss, same_for_all


@dataclass(frozen=True)
class BCOPairLoss(PairLoss):
    """-log sigmoid(x) - log sigmoid(-y) with the rewards x (chosen) and y (rejected).

    A reward is beta times a log-ratio. The paper subtracts a running mean of the rewards from each
    of them; this is TRL's form for pairs, which subtracts nothing.

    Source: arXiv:2404.04656.
    """

    name: ClassVar[str] = "bco_pair"
    by_answer: ClassVar[bool] = True

    def pair_loss(
        self, chosen_logratios: Tensor, rejected_logratios: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        chosen, rejected = self.beta * chosen_logratios, self.beta * rejected_logratios  # [P]
        loss = -F.logsigmoid(chosen) - F.logsigmoid(-rejected)
        return loss, -self.beta * torch.sigmoid(-chosen), self.beta * torch.sigmoid(rejected)

    def first_value(self, lengths: Tensor) -> Tensor:
        return same_for_all(2.0 * math.log(2.0), lengths)
