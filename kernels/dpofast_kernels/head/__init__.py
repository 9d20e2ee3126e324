"""Hidden states to log-probs and to the pair loss, without logits of size [N, V].

How a call travels through the files, from the public op down to one chunk of rows:

    dispatch        public ops: check the inputs, choose a back end, enter autograd
    |-- options     HeadOptions, PairExtras, Answers and the results
    |-- inputs      the checks and their errors
    sequence_loss   the public op of losses of single answers; from autograd on, the same way
    |-- dtypes      the dtypes to compute, accumulate and multiply in
    |-- backends    which back end runs where
    autograd        torch.autograd functions: what they save, when they compute gradients
    |-- cast        gradients times the upstream gradient, in the dtypes of the inputs
    |-- rescale     the same in place, where the factor is nearly always 1
    one_pass        of the ops with a loss: runs chunk after chunk and joins the losses
    |-- units       what a chunk is made of: sequences that no pair crosses
    |-- pairs       the pairs of a chunk, and the derivatives that they ask of its sequences
    |-- singles     the same for single answers
    |-- long_units  pairs that don't fit into a chunk
    |-- plan        the chunks of a call, from its sizes alone
    chunked         one head, chunk by chunk: score rows, then add their gradients
    |-- workspace   limits of chunks, and the memory for a chunk's logits
    |-- rows        the interface of a back end: score, differentiate, the losses
    tiled           the PyTorch back end, default on a CPU
    |-- matmul      the three matrix products, accumulated in fp32
    |-- sequences   sums of per-token log-probs over sequences
    |-- statistics  entropy and other numbers of each row's softmax, if asked for

`linear_logps`, `linear_scores` and `linear_statistics` skip one_pass. On a GPU, rows_triton or
fused_triton replaces tiled; tiles_triton has the kernels of fused_triton. In both back ends,
finish_triton turns sums of exponentials into log-probs, and pairs_triton and singles_triton compute
the losses; logits_triton and statistics_triton have what their kernels share. cast_triton has the
kernel of cast; launch reads the launch parameters of each kernel. naive computes all logits at
once, and tests compare every back end with it. So does probe, on the device and at the start of a
run.

A row here is a row of hidden states: one scored token.
"""

from __future__ import annotations

from dpofast_kernels.head.backends import backend_for
from dpofast_kernels.head.dispatch import (
    linear_logps,
    linear_pair_loss,
    linear_scores,
    linear_statistics,
)
from dpofast_kernels.head.options import (
    HEAD_VERSION,
    SEQUENCE_METRIC_NAMES,
    Answers,
    HeadOptions,
    PairExtras,
    PairLossOutput,
    SequenceLossOutput,
)
from dpofast_kernels.head.plan import ChunkPlan, plan_chunks
from dpofast_kernels.head.probe import HeadTraits, WrongHeadError, probe_head
from dpofast_kernels.head.sequence_loss import linear_sequence_loss
from dpofast_kernels.head.sequences import sum_per_sequence
from dpofast_kernels.head.statistics import STATISTICS

__all__ = [
    "HEAD_VERSION",
    "SEQUENCE_METRIC_NAMES",
    "STATISTICS",
    "Answers",
    "ChunkPlan",
    "HeadOptions",
    "HeadTraits",
    "PairExtras",
    "PairLossOutput",
    "SequenceLossOutput",
    "WrongHeadError",
    "backend_for",
    "linear_logps",
    "linear_pair_loss",
    "linear_scores",
    "linear_sequence_loss",
    "linear_statistics",
    "plan_chunks",
    "probe_head",
    "sum_per_sequence",
]
