"""Loss of exact optimisation (EXO) for pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dpofast_kernels.preference.loss import SmoothedLoss, along_difference, same_for_all


@dataclass(frozen=True)
class EXOPairLoss(SmoothedLoss):
    """KL((q, 1 - q) || (1 - e, e)) with q = sigmoid(z), DPO's margin z and label_smoothing e > 0.

    It is least at z = log((1 - e) / e).

    Source: arXiv:2402.00856, eq. 16.

    Raises:
        ValueError: label_smoothing is 0, where the loss is infinite.
    """

    name: ClassVar[str] = "exo_pair"
    takes_divergence: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.label_smoothing:
            raise ValueError(
                f"label_smoothing is {self.label_smoothing}, but the exo_pair loss needs one above "
                "0: set it to 1e-3, as its paper does."
            )

    def smoothed_loss(
        self,
        chosen_logratios: Tensor,
        rejected_logratios: Tensor,
        lengths: Tensor,
        smoothing: float | Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # A single number stays on the host; [] or [P].
        smoothing = torch.as_tensor(smoothing, dtype=torch.float64)
        right, swapped = torch.log1p(-smoothing), torch.log(smoothing)
        margins = self.beta * (chosen_logratios - rejected_logratios)  # [P]
        is_right, is_swapped = torch.sigmoid(margins), torch.sigmoid(-margins)  # q, 1 - q
        loss = is_right * (F.logsigmoid(margins) - right)
        loss = loss + is_swapped * (F.logsigmoid(-margins) - swapped)
        slope = self.beta * is_right * is_swapped * (margins - (right - swapped))
        return loss, slope, -slope

    def first_value(self, lengths: Tensor) -> Tensor:
        smoothing = self.label_smoothing
        return same_for_all(-math.log(2.0) - 0.5 * math.log(smoothing * (1 - smoothing)), lengths)

    def direction(self, lengths: Tensor) -> Tensor:
        return along_difference(lengths)
