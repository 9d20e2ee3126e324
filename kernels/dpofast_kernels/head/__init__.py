"""Hidden states to log-probs and to the pair loss, without logits of size [N, V].

How a call travels through the files, from the public op down to one chunk of rows:

    dispatch        public ops: check the inputs, choose a back end, hand over to autograd
    |-- inputs      the checks and their errors
    |-- dtypes      the dtypes to compute, accumulate and multiply in
    |-- backends    which back end runs where
    autograd        torch.autograd functions: what is saved, when gradients are made
    one_pass        linear_pair_loss only: cuts pairs into chunks and joins their losses
    chunked         one head, chunk by chunk: score rows, then add their gradients
    |-- workspace   sizes of chunks, and the memory that a chunk's logits are made in
    |-- rows        what a back end has to offer for a chunk: score, differentiate, pair_loss
    tiled           the PyTorch back end for a chunk, default on a CPU
    |-- matmul      the three matrix products, accumulated in fp32

`linear_logps` and `linear_scores` skip one_pass. On a GPU rows_triton or fused_triton does the work
of tiled, with pairs_triton and logits_triton, and launch says how each kernel is launched. naive
computes all logits at once; tests compare every back end with it.

A row here is a row of hidden states: one scored token.
"""

from __future__ import annotations

from dpofast_kernels.head.backends import backend_for
from dpofast_kernels.head.dispatch import linear_logps, linear_pair_loss, linear_scores
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
