"""Loss of self-play preference optimization (SPPO) with hard labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dpofast_kernels.preference.loss import PairLoss, same_for_all


@dataclass(frozen=True)
class SPPOHardLoss(PairLoss):
    """(a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2 with chosen and rejected log-ratio a and b.

    Source: arXiv:2405.00675, eq. 4.7, with a probability of 1 that the chosen answer wins. The
    paper's eta is 1 / beta.
    """

    name: ClassVar[str] = "sppo_hard"
    by_answer: ClassVar[bool] = True

    def pair_loss(
        self, chosen_logratios: Tensor, rejected_logratios: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        chosen = chosen_logratios - 0.5 / self.beta  # [P]
        rejected = rejected_logratios + 0.5 / self.beta  # [P]
        return chosen.square() + rejected.square(), 2.0 * chosen, 2.0 * rejected

    def first_value(self, lengths: Tensor) -> Tensor:
        return same_for_all(0.5 / self.beta**2, lengths)
