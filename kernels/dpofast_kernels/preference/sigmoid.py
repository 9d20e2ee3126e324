"""The loss of DPO. With label smoothing it is that of conservative DPO (cDPO)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dpofast_kernels.preference.loss import PairLoss


@dataclass(frozen=True)
class SigmoidLoss(PairLoss):
    """-(1 - e) log sigmoid(z) - e log sigmoid(-z) with z = beta (chosen - rejected log-ratio).

    Source: arXiv:2305.18290, eq. 7. With label_smoothing e > 0 it is cDPO: E. Mitchell, "A note on
    DPO with noisy preferences and relationship to IPO" (2023), eq. 3.
    """

    name: ClassVar[str] = "sigmoid"
    takes_label_smoothing: ClassVar[bool] = True

    def pair_loss(
        self, chosen_logratios: Tensor, rejected_logratios: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        margins = self.beta * (chosen_logratios - rejected_logratios)  # [P]
        smoothing = self.label_smoothing
        loss = -(1.0 - smoothing) * F.logsigmoid(margins)
        slope = -(1.0 - smoothing) * torch.sigmoid(-margins)
        if smoothing:
            loss = loss - smoothing * F.logsigmoid(-margins)
            slope = slope + smoothing * torch.sigmoid(margins)
        return loss, self.beta * slope, -self.beta * slope

    def direction(self, lengths: Tensor) -> Tensor:
        signs = torch.tensor([1.0, -1.0], dtype=torch.float64, device=lengths.device)
        return signs.expand(len(lengths), 2)
