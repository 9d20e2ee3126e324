"""Kernels for Direct Preference Optimization. They need only PyTorch, and Triton on a GPU.

Names of dimensions in this package:

    P    pairs
    S    sequences, usually 2P: chosen_0, rejected_0, chosen_1, rejected_1, ...
    T    packed tokens, prompts included
    N    scored tokens: the tokens of the answers
    H    hidden size
    V    vocabulary size
    B*   block sizes of a kernel (BV: block of the vocabulary)

`bounds` [S+1] delimits the sequences: the scored tokens of sequence s are rows
bounds[s]:bounds[s+1]. `logps` are summed over a sequence, `per_token_logps` are not; both are in
nats. `ref_` always means the reference policy.
"""

from __future__ import annotations

from dpofast_kernels.head import (
    HEAD_VERSION,
    SEQUENCE_METRIC_NAMES,
    STATISTICS,
    Answers,
    HeadOptions,
    PairExtras,
    PairLossOutput,
    SequenceLossOutput,
    backend_for,
    linear_logps,
    linear_pair_loss,
    linear_scores,
    linear_sequence_loss,
    linear_statistics,
    sum_per_sequence,
)
from dpofast_kernels.preference import (
    COUPLED_LOSSES,
    DIVERGENCES,
    LOSS_OPTIONS,
    LOSSES,
    METRIC_NAMES,
    UNPAIRED_LOSSES,
    CoupledCustomLoss,
    CoupledFunction,
    CoupledLoss,
    CustomLoss,
    DivergenceLoss,
    NotAPairLossError,
    PairFunction,
    PairLoss,
    PairWeighting,
    PreferenceLoss,
    UnpairedLoss,
    ZeroLoss,
    make_coupled_custom_loss,
    make_coupled_loss,
    make_custom_loss,
    make_loss,
    make_mixture,
    make_unpaired_loss,
    pair_metrics,
    unknown_loss,
)

__all__ = [
    "COUPLED_LOSSES",
    "DIVERGENCES",
    "HEAD_VERSION",
    "LOSSES",
    "LOSS_OPTIONS",
    "METRIC_NAMES",
    "SEQUENCE_METRIC_NAMES",
    "STATISTICS",
    "UNPAIRED_LOSSES",
    "Answers",
    "CoupledCustomLoss",
    "CoupledFunction",
    "CoupledLoss",
    "CustomLoss",
    "DivergenceLoss",
    "HeadOptions",
    "NotAPairLossError",
    "PairExtras",
    "PairFunction",
    "PairLoss",
    "PairLossOutput",
    "PairWeighting",
    "PreferenceLoss",
    "SequenceLossOutput",
    "UnpairedLoss",
    "ZeroLoss",
    "backend_for",
    "linear_logps",
    "linear_pair_loss",
    "linear_scores",
    "linear_sequence_loss",
    "linear_statistics",
    "make_coupled_custom_loss",
    "make_coupled_loss",
    "make_custom_loss",
    "make_loss",
    "make_mixture",
    "make_unpaired_loss",
    "pair_metrics",
    "sum_per_sequence",
    "unknown_loss",
]
