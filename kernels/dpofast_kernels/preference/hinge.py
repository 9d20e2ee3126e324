"""Hinge loss on DPO's margin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dpofast_kernels.preference.loss import PairLoss, along_difference, same_for_all


@dataclass(frozen=True)
class HingeLoss(PairLoss):
    """max(0, 1 - z) with z = beta (chosen - rejected log-ratio).

    Source: SLiC, arXiv:2305.10425, in the normalised form of RSO, arXiv:2309.06657, table 1.
    """

    name: ClassVar[str] = "hinge"
    takes_divergence: ClassVar[bool] = True

    def pair_loss(
        self, chosen_logratios: Tensor, rejected_logratios: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss = torch.relu(1.0 - self.beta * (chosen_logratios - rejected_logratios))  # [P]
        # At the kink the slope is 0, as PyTorch defines the derivative of relu.
        slope = -self.beta * (loss > 0).to(loss.dtype)
        return loss, slope, -slope

    def first_value(self, lengths: Tensor) -> Tensor:
        return same_for_all(1.0, lengths)

    def direction(self, lengths: Tensor) -> Tensor:
        return along_difference(lengths)
