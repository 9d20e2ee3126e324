"""Hidden states to log-probs and the pair loss, without logits of the size [N, V]."""

from __future__ import annotations

from dpofast_kernels.head.dispatch import backend_for, linear_logps, linear_pair_loss, linear_scores
from dpofast_kernels.head.options import HEAD_VERSION, HeadOptions, PairLossOutput
from dpofast_kernels.head.sequences import sum_per_sequence

__all__ = [
    "HEAD_VERSION",
    "HeadOptions",
    "PairLossOutput",
    "backend_for",
    "linear_logps",
    "linear_pair_loss",
    "linear_scores",
    "sum_per_sequence",
]
