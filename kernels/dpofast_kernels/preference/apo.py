"""Losses of anchored preference optimization (APO), which move each answer in a set direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dpofast_kernels.preference.loss import PairLoss, same_for_all


@dataclass(frozen=True)
class APOZeroLoss(PairLoss):
    """1 - sigmoid(beta a) + sigmoid(beta b) with the chosen log-ratio a and the rejected one b.

    The chosen answer becomes more probable than under the reference, the rejected one less.

    Source: arXiv:2408.06266, eq. 7.
    """

    name: ClassVar[str] = "apo_zero"
    by_answer: ClassVar[bool] = True

    def pair_loss(
        self, chosen_logratios: Tensor, rejected_logratios: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        chosen, rejected = self.beta * chosen_logratios, self.beta * rejected_logratios  # [P]
        # 1 - sigmoid(x) would round to 0 beyond x = 37.
        loss = torch.sigmoid(-chosen) + torch.sigmoid(rejected)
        return loss, -self.beta * _bell(chosen), self.beta * _bell(rejected)

    def first_value(self, lengths: Tensor) -> Tensor:
        return same_for_all(1.0, lengths)


@dataclass(frozen=True)
class APODownLoss(PairLoss):
    """sigmoid(beta a) + 1 - sigmoid(beta (a - b)) with chosen and rejected log-ratio a and b.

    Both answers become less probable than under the reference, the rejected one more so.

    Source: arXiv:2408.06266, eq. 8.
    """

    name: ClassVar[str] = "apo_down"

    def pair_loss(
        self, chosen_logratios: Tensor, rejected_logratios: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        chosen = self.beta * chosen_logratios  # [P]
        margins = self.beta * (chosen_logratios - rejected_logratios)  # [P]
        loss = torch.sigmoid(chosen) + torch.sigmoid(-margins)
        return loss, self.beta * (_bell(chosen) - _bell(margins)), self.beta * _bell(margins)

    def first_value(self, lengths: Tensor) -> Tensor:
        return same_for_all(1.0, lengths)


def _bell(x: Tensor) -> Tensor:
    """The derivative of sigmoid."""
    return torch.sigmoid(x) * torch.sigmoid(-x)
