"""Sums per sequence and the loss of each pair, in one launch."""

# jit functions can't be typed, and Triton and torch.cuda.device_of are not
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpofast_kernels.head.rows import PairTerms
from dpofast_kernels.preference import PairLoss
from dpofast_kernels.preference.formulas_triton import FORMULAS

BLOCK_N = 1024


@triton.jit
def _sum_rows(p_logps, start, end, BN: tl.constexpr):
    """Sum of rows start:end in fp64, in an order that their number alone decides."""
    b_sum = tl.zeros([BN], dtype=tl.float64)
    for i_start in range(start, end, BN):
        o_n = i_start + tl.arange(0, BN)
        b_sum += tl.load(p_logps + o_n, mask=o_n < end, other=0.0).to(tl.float64)  # [BN]
    return tl.sum(b_sum, axis=0)


@triton.jit
def pair_loss_kernel(
    p_per_token_logps,  # [n]
    p_bounds,  # [2P+1] int64
    p_ref_logps,  # [2P] fp64
    p_settings,  # [2] fp64: beta, label_smoothing; a float argument would be rounded to fp32
    p_losses,  # [P] fp64
    p_logps,  # [2P] fp64
    p_d_logps,  # [2P] fp64
    FORMULA: tl.constexpr,
    BN: tl.constexpr,
):
    """One program a pair."""
    i_pair = tl.program_id(0).to(tl.int64)
    start = tl.load(p_bounds + 2 * i_pair)
    middle = tl.load(p_bounds + 2 * i_pair + 1)
    end = tl.load(p_bounds + 2 * i_pair + 2)
    chosen = _sum_rows(p_per_token_logps, start, middle, BN)
    rejected = _sum_rows(p_per_token_logps, middle, end, BN)
    loss, d_chosen, d_rejected = FORMULA(
        chosen - tl.load(p_ref_logps + 2 * i_pair),
        rejected - tl.load(p_ref_logps + 2 * i_pair + 1),
        (middle - start).to(tl.float64),
        (end - middle).to(tl.float64),
        tl.load(p_settings),
        tl.load(p_settings + 1),
    )
    tl.store(p_losses + i_pair, loss)
    tl.store(p_logps + 2 * i_pair, chosen)
    tl.store(p_logps + 2 * i_pair + 1, rejected)
    tl.store(p_d_logps + 2 * i_pair, d_chosen)
    tl.store(p_d_logps + 2 * i_pair + 1, d_rejected)


def pair_loss_fwd(
    per_token_logps: Tensor,  # [n]
    bounds: Tensor,  # [2P+1]
    ref_logps: Tensor,  # [2P]
    loss: PairLoss,
) -> PairTerms:
    """Sums per sequence in fp64, and each pair's loss.

    Raises:
        ValueError: the loss has no formula in Triton.
    """
    num_pairs = len(ref_logps) // 2
    losses, logps = ref_logps.new_empty(num_pairs), torch.empty_like(ref_logps)
    d_logps = torch.empty_like(ref_logps)
    settings = torch.tensor([loss.beta, loss.label_smoothing], dtype=torch.float64)
    with torch.cuda.device_of(per_token_logps):
        pair_loss_kernel[(num_pairs,)](
            per_token_logps,
            bounds.contiguous(),
            ref_logps.contiguous(),
            settings.to(ref_logps.device, non_blocking=True),
            losses,
            logps,
            d_logps,
            FORMULA=formula_of(loss),
            BN=BLOCK_N,
        )
    return PairTerms(losses, logps, d_logps)


def formula_of(loss: PairLoss) -> Any:
    """The loss as a jit function.

    Raises:
        ValueError: it has none.
    """
    if loss.name not in FORMULAS:
        raise ValueError(
            f"The loss {loss.name!r} has no formula in Triton: choose backend 'torch', or one of "
            f"{', '.join(sorted(FORMULAS))}."
        )
    return FORMULAS[loss.name]
