"""The losses of preference pairs, their derivatives and metrics; they stand nowhere else."""

from __future__ import annotations

from dpofast_kernels.preference.loss import PairLoss
from dpofast_kernels.preference.metrics import pair_metrics
from dpofast_kernels.preference.registry import LOSSES, make_loss

__all__ = ["LOSSES", "PairLoss", "make_loss", "pair_metrics"]
