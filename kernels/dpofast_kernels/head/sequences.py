"""Sums of per-token log-probs over sequences."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def sum_per_sequence(
    per_token_logps: Tensor,  # [N]
    bounds: Tensor,  # [S+1]
) -> Tensor:
    """Sum over each sequence's tokens, in float64: over thousands of tokens fp32 loses digits.

    Args:
        per_token_logps: [N], any floating dtype.
        bounds: [S+1] int64, from 0 to N; on the CPU or on the device of `per_token_logps`. An empty
            sequence sums to 0.

    Returns:
        [S] fp64; differentiable.

    Raises:
        ValueError: the bounds don't cover the rows.

    Example:
        >>> import torch
        >>> from dpofast_kernels import sum_per_sequence
        >>> per_token_logps = torch.tensor([-1.0, -2.0, -0.5])
        >>> sum_per_sequence(per_token_logps, torch.tensor([0, 2, 3])).tolist()
        [-3.0, -0.5]
    """
    if per_token_logps.dim() != 1:
        raise ValueError(f"per_token_logps is {list(per_token_logps.shape)}, expected [N].")
    check_bounds(bounds, len(per_token_logps))
    return segment_sums(per_token_logps, bounds)


def segment_sums(
    per_token_logps: Tensor,  # [N]
    bounds: Tensor,  # [S+1]
) -> Tensor:
    """`sum_per_sequence` for bounds that are checked already: [S] fp64."""
    if len(bounds) == 1:
        # Without sequences there are no rows either. Adding the rows' sum, which is 0, keeps the
        # result part of autograd's graph.
        return per_token_logps.new_zeros(0, dtype=torch.float64) + per_token_logps.double().sum()
    offsets = bounds.to(per_token_logps.device, non_blocking=True)
    return torch.segment_reduce(per_token_logps.double(), "sum", offsets=offsets, unsafe=True)


def check_bounds(bounds: Tensor, num_rows: int) -> list[int]:
    """Check the bounds and return them as a list.

    Bounds are int64 [S+1], begin at 0, never decrease, and end at `num_rows`.

    Raises:
        ValueError: the bounds break one of these rules.
    """
    if bounds.dim() != 1 or len(bounds) < 1 or bounds.dtype != torch.int64:
        raise ValueError(
            f"bounds is {list(bounds.shape)} {bounds.dtype}, expected [S+1] torch.int64."
        )
    limits: list[int] = bounds.tolist()
    if limits[0] != 0 or limits[-1] != num_rows:
        raise ValueError(
            f"bounds run from {limits[0]} to {limits[-1]}, expected 0 to {num_rows}, the number "
            "of scored tokens."
        )
    for index, (start, end) in enumerate(pairwise(limits)):
        if end < start:
            raise ValueError(
                f"bounds fall from {start} to {end} at sequence {index}; expected them never to."
            )
    return limits
