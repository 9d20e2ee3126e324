"""Losses of preference pairs, their derivatives and metrics.

Each formula is written twice, in PyTorch and for Triton. Both versions are in this folder.
"""

from __future__ import annotations

from dpofast_kernels.preference.loss import PairLoss
from dpofast_kernels.preference.metrics import METRIC_NAMES, pair_metrics
from dpofast_kernels.preference.registry import LOSSES, make_loss

__all__ = ["LOSSES", "METRIC_NAMES", "PairLoss", "make_loss", "pair_metrics"]
