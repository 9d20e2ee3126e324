"""Losses of contrastive preference optimization (CPO): DPO's kind without a reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dpofast_kernels.preference.hinge import HingeLoss
from dpofast_kernels.preference.ipo import IPOLoss
from dpofast_kernels.preference.sigmoid import SigmoidLoss


@dataclass(frozen=True)
class CPOLoss(SigmoidLoss):
    """The sigmoid loss of log-probs: z = beta (chosen - rejected log-prob).

    Source: arXiv:2401.08417, eq. 3, whose second term is the likelihood of chosen answers.
    """

    name: ClassVar[str] = "cpo"
    takes_divergence: ClassVar[bool] = False
    reference_free: ClassVar[bool] = True


@dataclass(frozen=True)
class CPOHingeLoss(HingeLoss):
    """The hinge loss of log-probs, as TRL's CPOTrainer has it: SLiC, arXiv:2305.10425."""

    name: ClassVar[str] = "cpo_hinge"
    takes_divergence: ClassVar[bool] = False
    reference_free: ClassVar[bool] = True


@dataclass(frozen=True)
class CPOIPOLoss(IPOLoss):
    """The loss of IPO for mean log-probs per token, as TRL's CPOTrainer has it."""

    name: ClassVar[str] = "cpo_ipo"
    takes_divergence: ClassVar[bool] = False
    reference_free: ClassVar[bool] = True
    rewards_per_token: ClassVar[bool] = True
