"""The last kernel of both Triton back ends: sums of exp(z - k) become log-probs.

z is a logit and k the label's own. So exp(z - k) is p / p_label, and its sum over the vocabulary is
1 / p_label: the sums don't need the row's maximum. If a sum is above `MAX_REST` (the label's
probability is below 1e-28) or not finite, the kernel computes the row again with the row's maximum
as k.
"""

# jit functions can't be typed, and torch.cuda.device_of has no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpofast_kernels.head.launch import launch_options
from dpofast_kernels.head.logits_triton import (
    LN2,
    exponents,
    in_nats,
    label_logp,
    row_logsumexp,
    scaled,
    unscaled_logits,
)
from dpofast_kernels.head.rows import ScoredRows
from dpofast_kernels.head.statistics_triton import moments, store_statistics

# exp(z - k) up to this bound, times hidden states or weights, stays far inside the range of fp32
# and bf16. So do the factors -1 / S (see `label_logp`), which scale it down again.
MAX_REST = 2.0**96
# exp(z - k) can be as large as MAX_REST, whose square fp32 doesn't hold. The sums of squares are
# those of this multiple. What it makes too small for fp32 doesn't count next to 1.
SQUARES_UNIT = tl.constexpr(2.0**-40)


@triton.jit
def _row_products(
    p_x,  # [H]
    p_weight,
    o_v,  # [BV]
    m_v,
    stride_w,
    stride_h,
    H,
    dtype: tl.constexpr,
    BV: tl.constexpr,
    BH: tl.constexpr,
):
    """[BV] products of one row."""
    b_z = tl.zeros([BV], dtype=dtype)
    for i_h in range(0, H, BH):
        o_h = i_h + tl.arange(0, BH)
        b_x = tl.load(p_x + o_h, mask=o_h < H, other=0.0).to(dtype)  # [BH]
        p_w = p_weight + o_v[:, None].to(tl.int64) * stride_w + o_h[None, :].to(tl.int64) * stride_h
        b_w = tl.load(p_w, mask=m_v[:, None] & (o_h < H)[None, :], other=0.0).to(dtype)
        b_z += tl.sum(b_w * b_x[None, :], axis=1)
    return b_z


@triton.jit
def _row_sum(
    p_sums,  # [num_tiles, n]
    i_n,
    n,
    num_tiles,
    BT: tl.constexpr,
):
    """The sum of a row's tiles in fp64, in a fixed order: the same inputs give the same bits."""
    b_sum = tl.zeros([BT], dtype=tl.float64)
    for i_t in range(0, num_tiles, BT):
        o_t = i_t + tl.arange(0, BT)
        p_t = p_sums + o_t.to(tl.int64) * n + i_n
        b_sum += tl.load(p_t, mask=o_t < num_tiles, other=0.0).to(tl.float64)
    return tl.sum(b_sum, axis=0)


@triton.jit(
    do_not_specialize=["n", "num_tiles"],
    do_not_specialize_on_alignment=[
        "p_labels", "p_targets", "p_logps", "p_factors", "p_logsumexps", "p_statistics"
    ],
)  # fmt: skip
def finish_rows_kernel(
    p_hidden_states,  # [n, H]
    p_weight,  # [V, H]
    p_bias,  # [V]
    p_labels,  # [n] int64
    p_targets,  # [n], product of each row with the weight of its label
    p_d_logits,  # [n, V], rows `stride_d` apart
    p_sums,  # [1, num_tiles, n], with statistics [5, num_tiles, n]; see `new_sums`
    p_logps,  # [n]
    p_factors,  # [n]
    p_logsumexps,  # [n], written only without KEEP
    p_statistics,  # [K, n]
    n,
    V,
    H,
    num_tiles,
    stride_x,
    stride_w,
    stride_h,
    stride_d,
    MAX_REST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CAP: tl.constexpr,
    UNIT: tl.constexpr,
    SLOPE: tl.constexpr,
    ENTROPY: tl.constexpr,
    MEAN_LOGIT: tl.constexpr,
    IS_TOP: tl.constexpr,
    LOG_SUM_P2: tl.constexpr,
    KEEP: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BH: tl.constexpr,
):
    """Log-probs and statistics from the sums of the tiles, and the gradient at the label.

    There is one program per row.
    """
    i_n = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = p_targets.dtype.element_ty
    p_d = p_d_logits + i_n * stride_d
    plane = tl.cast(num_tiles, tl.int64) * n
    rest = _row_sum(p_sums, i_n, n, num_tiles, BT)
    moment = tl.full([], 0.0, dtype=tl.float64)
    squares, logit_sum, above = moment, moment, moment
    if ENTROPY is not None:
        moment = _row_sum(p_sums + plane, i_n, n, num_tiles, BT)
    if LOG_SUM_P2 is not None:
        squares = _row_sum(p_sums + 2 * plane, i_n, n, num_tiles, BT)
        squares *= 1.0 / (SQUARES_UNIT * SQUARES_UNIT)
    if MEAN_LOGIT is not None:
        logit_sum = _row_sum(p_sums + 3 * plane, i_n, n, num_tiles, BT)
    if IS_TOP is not None:
        above = _row_sum(p_sums + 4 * plane, i_n, n, num_tiles, BT)
    label = tl.load(p_labels + i_n)
    x_label, slope = unscaled_logits(tl.load(p_targets + i_n), p_bias, label, True, HAS_BIAS, CAP)
    target = in_nats(x_label, UNIT)
    reference, d_label = target, -rest
    # k2 was rounded before it was subtracted. What that changed is taken back here, for all of the
    # row's terms at once.
    shift = scaled(x_label, UNIT).to(tl.float64) * LN2 - target
    unrounded = tl.exp(shift)
    moment = (moment * LN2 + rest * shift) * unrounded
    rest, squares = rest * unrounded, squares * unrounded * unrounded
    # Compute the row again with its maximum as k: first the maximum, then the sum. The comparison
    # is written as a negated <=, which is true for NaN, too.
    if (rest <= MAX_REST) == 0:
        p_x = p_hidden_states + i_n * stride_x
        x_max = tl.full([], float("-inf"), dtype=dtype)
        for i_v in range(0, V, BV):
            o_v = i_v + tl.arange(0, BV)
            m_v = o_v < V
            b_z = _row_products(p_x, p_weight, o_v, m_v, stride_w, stride_h, H, dtype, BV, BH)
            b_x, _ = unscaled_logits(b_z, p_bias, o_v, m_v, HAS_BIAS, CAP)
            x_max = tl.maximum(x_max, tl.max(tl.where(m_v, b_x, float("-inf")), axis=0))
        k2 = scaled(x_max, UNIT)
        reference, unrounded = k2.to(tl.float64) * LN2, tl.full([], 1.0, dtype=tl.float64)
        rest = tl.full([], 0.0, dtype=tl.float64)
        moment, squares = rest, rest
        for i_v in range(0, V, BV):
            o_v = i_v + tl.arange(0, BV)
            m_v = o_v < V
            b_z = _row_products(p_x, p_weight, o_v, m_v, stride_w, stride_h, H, dtype, BV, BH)
            b_x, b_slope = unscaled_logits(b_z, p_bias, o_v, m_v, HAS_BIAS, CAP)
            m_rest = m_v & (o_v != label)
            b_exponent = exponents(b_x, k2, UNIT)
            b_e = tl.where(m_rest, tl.exp2(b_exponent), 0.0)
            rest += tl.sum(b_e.to(tl.float64), axis=0)
            if ENTROPY is not None:
                moment += tl.sum(moments(b_e, b_exponent).to(tl.float64), axis=0)
            if LOG_SUM_P2 is not None:
                squares += tl.sum((b_e * b_e).to(tl.float64), axis=0)
            if KEEP:
                tl.store(p_d + o_v, (b_e * b_slope).to(p_d.dtype.element_ty), mask=m_rest)
        moment, d_label = moment * LN2, -rest
    logp, factor = label_logp(target, reference, rest)
    tl.store(p_logps + i_n, logp.to(dtype))
    if KEEP:
        tl.store(p_factors + i_n, (factor * unrounded * SLOPE).to(dtype))
        # The label's entry exp(z_label - k) - S is written as -R, so no digits cancel.
        tl.store(p_d + label, (d_label.to(dtype) * slope).to(p_d.dtype.element_ty))
    else:
        tl.store(p_logsumexps + i_n, row_logsumexp(target, reference, rest).to(dtype))
    store_statistics(
        p_statistics, i_n, tl.num_programs(0), V, target, reference, above == 0.0,
        rest, moment, squares, logit_sum * UNIT, ENTROPY, MEAN_LOGIT, IS_TOP, LOG_SUM_P2,
    )  # fmt: skip


def new_sums(like: Tensor, num_tiles: int, num_rows: int, has_statistics: bool) -> Tensor:
    """[1 or 5, num_tiles, n]: what the kernels before `finish_rows_fwd` sum over each tile.

    With E = exp(z - k), the planes are the sums of E, of E (z - k) LOG2E, of E^2 SQUARES_UNIT^2,
    and of x, and the number of logits above the label's. The label is in the sum of x only. Without
    statistics there is the first plane alone.
    """
    return like.new_empty(5 if has_statistics else 1, num_tiles, num_rows)


def finish_rows_fwd(
    hidden_states: Tensor,  # [n, H], rows without gaps
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [n]
    targets: Tensor,  # [n]
    d_logits: Tensor | None,  # [n, V]
    sums: Tensor,  # see `new_sums`
    statistics: tuple[str, ...],
    constants: dict[str, Any],
) -> ScoredRows:
    """Launch `finish_rows_kernel`: exp(z - k) in `d_logits` and its sums become scored rows.

    `ScoredRows.kept` is (d_logits, factors): row r of the gradient is factors[r] * d_logits[r].
    """
    num_rows, (vocab_size, hidden_size) = len(labels), weight.shape
    logps, factors, logsumexps = targets.new_empty(3, num_rows).unbind()
    found = targets.new_empty(len(statistics), num_rows) if statistics else None  # [K, n]
    with torch.cuda.device_of(weight):
        finish_rows_kernel[(num_rows,)](
            hidden_states, weight, targets if bias is None else bias, labels, targets,
            targets if d_logits is None else d_logits, sums,
            logps, factors, logsumexps, targets if found is None else found,
            num_rows, vocab_size, hidden_size, sums.shape[1],
            hidden_states.stride(0), *weight.stride(),
            0 if d_logits is None else d_logits.stride(0),
            MAX_REST=MAX_REST, **constants, KEEP=d_logits is not None,
            **launch_options("finish_rows", weight.device),
        )  # fmt: skip
    if d_logits is None:
        return ScoredRows(logps, (), logsumexps, found)
    return ScoredRows(logps, (d_logits, factors), statistics=found)
