"""The losses of AOT, which compare sorted log-ratios: distributions, rather than single pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dpofast_kernels.preference.coupled import CoupledLoss
from dpofast_kernels.preference.loss import same_for_all
from dpofast_kernels.preference.sigmoid import logistic


@dataclass(frozen=True)
class AOTLoss(CoupledLoss):
    """-(1 - e) log sigmoid(z) - e log sigmoid(-z), z = beta (policy's log-ratio - reference's).

    Here a log-ratio is that of the chosen answer over the rejected one, under the same model. Each
    log-ratio of the policy is compared with the one of the same rank among the reference's; the
    loss belongs to the pair with this log-ratio of the policy. Equal ones keep their order.

    Source: AOT for pairs, arXiv:2406.05882.
    """

    name: ClassVar[str] = "aot"
    takes_label_smoothing: ClassVar[bool] = True

    def losses(
        self,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        ref_chosen_logps: Tensor,
        ref_rejected_logps: Tensor,
        lengths: Tensor,
    ) -> Tensor:
        logratios = chosen_logps - rejected_logps
        ref_logratios = ref_chosen_logps - ref_rejected_logps
        return _of_same_rank(logratios, ref_logratios, self.beta, self.label_smoothing)

    def first_value(self, lengths: Tensor) -> Tensor:
        return same_for_all(math.log(2.0), lengths)


@dataclass(frozen=True)
class AOTUnpairedLoss(CoupledLoss):
    """The loss of `AOTLoss` with z = beta (chosen log-ratio - rejected log-ratio of the same rank).

    Here a log-ratio is that of the policy over the reference. The loss belongs to the pair of the
    chosen answer.

    Source: AOT for unpaired answers, arXiv:2406.05882.
    """

    name: ClassVar[str] = "aot_unpaired"
    takes_label_smoothing: ClassVar[bool] = True

    def losses(
        self,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        ref_chosen_logps: Tensor,
        ref_rejected_logps: Tensor,
        lengths: Tensor,
    ) -> Tensor:
        chosen, rejected = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
        return _of_same_rank(chosen, rejected, self.beta, self.label_smoothing)

    def first_value(self, lengths: Tensor) -> Tensor:
        return same_for_all(math.log(2.0), lengths)


def _of_same_rank(
    better: Tensor,  # [P]
    worse: Tensor,  # [P]
    beta: float,
    smoothing: float,
) -> Tensor:
    """[P]: the logistic loss of each `better` value minus the `worse` value of the same rank."""
    ranked = torch.sort(better, stable=True)
    margins = beta * (ranked.values - torch.sort(worse, stable=True).values)
    losses = logistic(margins, smoothing)[0]
    return torch.empty_like(losses).index_copy(0, ranked.indices, losses)
