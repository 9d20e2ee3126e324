"""Loss of identity preference optimization (IPO)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dpofast_kernels.preference.loss import PairLoss, along_mean_difference, same_for_all


@dataclass(frozen=True)
class IPOLoss(PairLoss):
    """(h - 1 / (2 beta))^2, where h is the difference of the mean log-ratios per token.

    Source: arXiv:2310.12036, eq. 17, where beta is called tau. In the paper h is a difference of
    sums over whole answers. For their own results its authors divided each log-ratio by the
    answer's number of tokens, as TRL does.
    """

    name: ClassVar[str] = "ipo"
    takes_divergence: ClassVar[bool] = True

    def pair_loss(
        self, chosen_logratios: Tensor, rejected_logratios: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens = lengths.to(chosen_logratios)  # [P, 2]
        mean_margins = chosen_logratios / tokens[:, 0] - rejected_logratios / tokens[:, 1]  # [P]
        distance = mean_margins - 0.5 / self.beta
        return distance.square(), 2.0 * distance / tokens[:, 0], -2.0 * distance / tokens[:, 1]

    def first_value(self, lengths: Tensor) -> Tensor:
        return same_for_all(0.25 / self.beta**2, lengths)

    def direction(self, lengths: Tensor) -> Tensor:
        return along_mean_difference(lengths)
