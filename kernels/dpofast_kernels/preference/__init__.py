"""Losses of preference pairs and of single answers, their derivatives and metrics.

Each formula is written twice, in PyTorch and for Triton. Both versions are in this folder. Sums of
losses, other divergences and WPO's weights are computed from their results, in PyTorch. A user's
own loss is a function in PyTorch only, which autograd derives. So are the losses that couple pairs,
which are computed for all pairs of an optimizer step at once.
"""

from __future__ import annotations

from dpofast_kernels.preference.coupled import CoupledCustomLoss, CoupledFunction, CoupledLoss
from dpofast_kernels.preference.custom import (
    CustomLoss,
    NotAPairLossError,
    PairFunction,
    function_name,
)
from dpofast_kernels.preference.divergence import DIVERGENCES, DivergenceLoss
from dpofast_kernels.preference.loss import PairLoss, PreferenceLoss, ZeroLoss
from dpofast_kernels.preference.metrics import METRIC_NAMES, pair_metrics
from dpofast_kernels.preference.probe import make_coupled_custom_loss, make_custom_loss
from dpofast_kernels.preference.registry import (
    COUPLED_LOSSES,
    LOSS_OPTIONS,
    LOSSES,
    make_coupled_loss,
    make_loss,
    make_mixture,
    unknown_loss,
)
from dpofast_kernels.preference.unpaired import (
    UNPAIRED_LOSSES,
    APOZeroUnpairedLoss,
    KTOLoss,
    UnpairedLoss,
    make_unpaired_loss,
)
from dpofast_kernels.preference.weighting import PairWeighting

__all__ = [
    "COUPLED_LOSSES",
    "DIVERGENCES",
    "LOSSES",
    "LOSS_OPTIONS",
    "METRIC_NAMES",
    "UNPAIRED_LOSSES",
    "APOZeroUnpairedLoss",
    "CoupledCustomLoss",
    "CoupledFunction",
    "CoupledLoss",
    "CustomLoss",
    "DivergenceLoss",
    "KTOLoss",
    "NotAPairLossError",
    "PairFunction",
    "PairLoss",
    "PairWeighting",
    "PreferenceLoss",
    "UnpairedLoss",
    "ZeroLoss",
    "function_name",
    "make_coupled_custom_loss",
    "make_coupled_loss",
    "make_custom_loss",
    "make_loss",
    "make_mixture",
    "make_unpaired_loss",
    "pair_metrics",
    "unknown_loss",
]
