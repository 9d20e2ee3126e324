"""The chunks of a call, from its sizes alone: nothing is computed or allocated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from dpofast_kernels.head.dtypes import accumulate_dtype
from dpofast_kernels.head.units import PairIndices, cut_units, join_units
from dpofast_kernels.head.workspace import WeightGrad, chunk_limits, row_chunks


@dataclass(frozen=True)
class ChunkPlan:
    """How `linear_pair_loss` cuts a call.

    Attributes:
        rows: rows of each chunk, in the order of the sequences. A chunk is one matrix product of
            each kind, except a pair that doesn't fit.
        pieces: numbers of rows in which each chunk is scored; more than one only if the chunk is a
            pair that doesn't fit.
        rounds_at_once: whether the weight's gradient is written into the weight's dtype at once.
            Otherwise it is summed in fp32 and cast at the end.
    """

    rows: tuple[int, ...]
    pieces: tuple[tuple[int, ...], ...]
    rounds_at_once: bool


def plan_chunks(
    lengths: Sequence[int],
    vocab_size: int,
    hidden_size: int,
    dtype: torch.dtype = torch.bfloat16,
    workspace_dtype: torch.dtype | None = None,
    pairs: PairIndices | None = None,
    workspace_bytes: int | None = None,
    knows_upstream: bool = True,
) -> ChunkPlan:
    """The chunks of a call of `linear_pair_loss` on a GPU, with a gradient of the weight.

    Args:
        lengths: scored tokens of each sequence.
        vocab_size: V.
        hidden_size: H.
        dtype: dtype that the call computes in, and of the weight.
        workspace_dtype: dtype of a chunk's logits; None for that of the default back end: bf16 for
            bf16 ("triton_fused"), otherwise fp32, or fp64 for fp64 ("triton").
        pairs: chosen and rejected sequence of each pair; None for (0, 1), (2, 3), ...
        workspace_bytes: as in `HeadOptions`.
        knows_upstream: whether `HeadOptions.upstream` is given.

    Example:
        >>> from dpofast_kernels.head import plan_chunks
        >>> plan_chunks([1500, 1300, 2100, 1900, 900, 700], 151936, 896).rows
        (2800, 5600)
    """
    units = cut_units(list(accumulate(lengths, initial=0)), pairs)
    if workspace_dtype is None:
        workspace_dtype = dtype if dtype == torch.bfloat16 else accumulate_dtype(dtype)
    rounds = knows_upstream and dtype == torch.bfloat16
    weight_grad = WeightGrad.ROUNDED if rounds else WeightGrad.SUMMED
    limits = chunk_limits(
        *(sum(lengths), (vocab_size, hidden_size), dtype, workspace_dtype),
        *("cuda", workspace_bytes, False, weight_grad),
    )
    chunks = join_units(units, limits)
    pieces = [
        [rows.stop - rows.start for rows in row_chunks(chunk.start, chunk.end, limits.wanted)]
        if chunk.num_rows > limits.most
        else [chunk.num_rows]
        for chunk in chunks
    ]
    return ChunkPlan(
        tuple(chunk.num_rows for chunk in chunks),
        tuple(tuple(each) for each in pieces),
        rounds and sum(lengths) <= limits.wanted,
    )
