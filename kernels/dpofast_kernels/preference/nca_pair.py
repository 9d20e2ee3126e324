"""Loss of noise contrastive alignment (NCA) for pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dpofast_kernels.preference.loss import PairLoss, same_for_all


@dataclass(frozen=True)
class NCAPairLoss(PairLoss):
    """-log sigmoid(x) - log sigmoid(-x) / 2 - log sigmoid(-y) / 2 with the rewards x and y.

    x is beta times the chosen log-ratio, y beta times the rejected one.

    Source: arXiv:2402.05369, for two answers of which the chosen one has all the preference.
    """

    name: ClassVar[str] = "nca_pair"
    by_answer: ClassVar[bool] = True

    def pair_loss(
        self, chosen_logratios: Tensor, rejected_logratios: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        chosen, rejected = self.beta * chosen_logratios, self.beta * rejected_logratios  # [P]
        loss = -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))
        d_chosen = self.beta * (0.5 * torch.sigmoid(chosen) - torch.sigmoid(-chosen))
        return loss, d_chosen, 0.5 * self.beta * torch.sigmoid(rejected)

    def first_value(self, lengths: Tensor) -> Tensor:
        return same_for_all(2.0 * math.log(2.0), lengths)
