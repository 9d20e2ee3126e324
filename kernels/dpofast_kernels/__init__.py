"""The kernels of Direct Preference Optimization; needs PyTorch alone, and Triton on a GPU.

Shapes, everywhere in this package:

    P    pairs
    S    sequences, 2P: chosen_0, rejected_0, chosen_1, rejected_1, ...
    T    packed tokens, prompts included
    N    scored tokens: those of the answers
    H    hidden size
    V    vocabulary
    B*   blocks of a kernel (BV: block of the vocabulary)

`bounds` [S+1] are the sequences' limits: the scored tokens of sequence s are rows
bounds[s]:bounds[s+1]. `logps` are summed over a sequence, `per_token_logps` are not; both in nats.
`ref_` means the reference policy.
"""

from __future__ import annotations

from dpofast_kernels.head import (
    HEAD_VERSION,
    HeadOptions,
    PairLossOutput,
    backend_for,
    linear_logps,
    linear_pair_loss,
    linear_scores,
    sum_per_sequence,
)
from dpofast_kernels.preference import METRIC_NAMES, PairLoss, make_loss, pair_metrics

__all__ = [
    "HEAD_VERSION",
    "METRIC_NAMES",
    "HeadOptions",
    "PairLoss",
    "PairLossOutput",
    "backend_for",
    "linear_logps",
    "linear_pair_loss",
    "linear_scores",
    "make_loss",
    "pair_metrics",
    "sum_per_sequence",
]
