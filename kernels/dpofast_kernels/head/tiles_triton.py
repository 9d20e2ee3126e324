"""The kernels of the back end "triton_fused"; fused_triton launches them and explains them."""

# jit functions can't be typed.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from dpofast_kernels.head.logits_triton import finish_logits, label_logp, row_logsumexp
from dpofast_kernels.head.statistics_triton import moments, store_statistics

# A tile's exp(z - k) can be as large as MAX_REST, whose square fp32 doesn't hold. The sums of
# squares are those of this multiple. What it makes too small for fp32 doesn't count next to 1.
_SQUARES_UNIT = tl.constexpr(2.0**-40)


@triton.jit(do_not_specialize_on_alignment=["p_labels"])
def target_products_kernel(
    p_hidden_states,  # [n, H]
    p_weight,  # [V, H]
    p_labels,  # [n] int64
    p_targets,  # [n]
    stride_x,
    stride_w,
    H,
    BH: tl.constexpr,
):
    """hidden_states[r] . weight[labels[r]]; one program per row."""
    i_n = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = p_targets.dtype.element_ty
    p_x = p_hidden_states + i_n * stride_x
    p_w = p_weight + tl.load(p_labels + i_n) * stride_w
    b_sum = tl.zeros([BH], dtype=dtype)
    for i_h in range(0, H, BH):
        o_h = i_h + tl.arange(0, BH)
        b_x = tl.load(p_x + o_h, mask=o_h < H, other=0.0).to(dtype)
        b_w = tl.load(p_w + o_h, mask=o_h < H, other=0.0).to(dtype)
        b_sum += b_x * b_w
    tl.store(p_targets + i_n, tl.sum(b_sum, axis=0))


@triton.jit
def _load_block(
    rows,  # a matrix [?, H]: its descriptor, or a pointer to it
    i_row,
    i_h,
    stride,
    num_rows,
    H,
    BR: tl.constexpr,
    BH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """A block [BR, BH] that begins at (i_row, i_h), with zeros beyond the last column.

    Without a descriptor, row indices past the end are clamped to the last row. Results of clamped
    rows are never used, and valid reads need no mask.
    """
    if DESCRIPTORS:
        b_rows = rows.load([i_row, i_h])
    else:
        o_row = tl.minimum(i_row + tl.arange(0, BR), num_rows - 1).to(tl.int64)
        o_h = i_h + tl.arange(0, BH)
        p_rows = rows + o_row[:, None] * stride + o_h[None, :]
        b_rows = tl.load(p_rows, mask=(o_h < H)[None, :], other=0.0)
    return b_rows


# n and num_programs change from chunk to chunk, and labels are slices with any alignment. If Triton
# specialised on them, it would compile the kernel again and again.
@triton.jit(do_not_specialize=["n", "num_programs"], do_not_specialize_on_alignment=["p_labels"])
def score_tiles_kernel(
    hidden_states,  # [n, H]: a descriptor of blocks [BM, BK], or a pointer
    weight,  # [V, H]: a descriptor of blocks [BN, BK], or a pointer
    p_bias,  # [V]
    p_labels,  # [n] int64
    p_targets,  # [n], result of target_products_kernel
    p_d_logits,  # [n, V], rows `stride_d` apart
    p_sums,  # [1, tiles of V, n], with statistics [5, tiles of V, n]
    n,
    V,
    H,
    stride_x,
    stride_w,
    stride_d,
    num_programs,
    HAS_BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    MEAN_LOGIT: tl.constexpr,
    IS_TOP: tl.constexpr,
    LOG_SUM_P2: tl.constexpr,
    KEEP: tl.constexpr,
    UPCAST: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Write exp(z - k) times the slope of z, and each tile's sum of exp(z - k) without the labels.

    Statistics need more sums: those of E (z - k) and E^2 without the labels, where E is exp(z - k),
    that of z, and the number of logits above the label's.

    The kernel is persistent: each program takes every num_programs-th tile. Tiles are numbered in
    bands of GROUP row blocks, column by column inside a band. So tiles that run at the same time
    read the same hidden states and weights, and find them in the cache.
    """
    dtype: tl.constexpr = p_targets.dtype.element_ty
    num_m, num_n = tl.cdiv(n, BM), tl.cdiv(V, BN)
    for i_tile in tl.range(tl.program_id(0), num_m * num_n, num_programs, flatten=True):
        first_m = i_tile // (GROUP * num_n) * GROUP
        group = tl.minimum(num_m - first_m, GROUP)
        i_m = (first_m + i_tile % (GROUP * num_n) % group) * BM
        i_n = i_tile % (GROUP * num_n) // group
        b_z = tl.zeros([BM, BN], dtype=dtype)
        for i_h in range(0, H, BK):
            b_x = _load_block(hidden_states, i_m, i_h, stride_x, n, H, BM, BK, DESCRIPTORS)
            b_w = _load_block(weight, i_n * BN, i_h, stride_w, V, H, BN, BK, DESCRIPTORS)
            if UPCAST:
                b_x, b_w = b_x.to(dtype), b_w.to(dtype)
            # [BM, BK] @ [BK, BN] -> [BM, BN]
            b_z = tl.dot(b_x, b_w.T, b_z, input_precision="ieee", out_dtype=dtype)
        o_m, o_v = i_m + tl.arange(0, BM), i_n * BN + tl.arange(0, BN)
        m_m, m_v = o_m < n, o_v < V
        b_label = tl.load(p_labels + o_m, mask=m_m, other=0)  # [BM]
        b_target = tl.load(p_targets + o_m, mask=m_m, other=0.0)
        b_reference, _ = finish_logits(
            b_target, p_bias, b_label, m_m, HAS_BIAS, SCALE, SOFTCAP, TEMPERATURE
        )
        b_z, b_slope = finish_logits(
            b_z, p_bias, o_v[None, :], m_v[None, :], HAS_BIAS, SCALE, SOFTCAP, TEMPERATURE
        )
        m_rest = m_v[None, :] & (o_v[None, :] != b_label[:, None])
        b_e = tl.where(m_rest, tl.exp(b_z - b_reference[:, None]), 0.0)
        p_tile = p_sums + i_n.to(tl.int64) * n + o_m
        plane = tl.cast(num_n, tl.int64) * n
        tl.store(p_tile, tl.sum(b_e, axis=1), mask=m_m)
        if ENTROPY is not None:
            b_sum = tl.sum(moments(b_e, b_z - b_reference[:, None]), axis=1)
            tl.store(p_tile + plane, b_sum, mask=m_m)
        if LOG_SUM_P2 is not None:
            b_scaled = b_e * _SQUARES_UNIT
            tl.store(p_tile + 2 * plane, tl.sum(b_scaled * b_scaled, axis=1), mask=m_m)
        if MEAN_LOGIT is not None:
            b_sum = tl.sum(tl.where(m_v[None, :], b_z, 0.0), axis=1)
            tl.store(p_tile + 3 * plane, b_sum, mask=m_m)
        if IS_TOP is not None:
            # A negated <= counts NaN, too.
            m_above = m_rest & ((b_z <= b_reference[:, None]) == 0)
            tl.store(p_tile + 4 * plane, tl.sum(m_above.to(dtype), axis=1), mask=m_m)
        if KEEP:
            p_d = p_d_logits + o_m[:, None].to(tl.int64) * stride_d + o_v[None, :]
            b_d = (b_e * b_slope).to(p_d_logits.dtype.element_ty)
            tl.store(p_d, b_d, mask=m_m[:, None] & m_v[None, :])


@triton.jit
def _row_logits(
    p_x,  # [H]
    p_weight,
    p_bias,
    o_v,  # [BV]
    m_v,
    stride_w,
    H,
    dtype: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    BV: tl.constexpr,
    BH: tl.constexpr,
):
    """[BV] finished logits of one row, and their derivative with respect to the product."""
    b_z = tl.zeros([BV], dtype=dtype)
    for i_h in range(0, H, BH):
        o_h = i_h + tl.arange(0, BH)
        b_x = tl.load(p_x + o_h, mask=o_h < H, other=0.0).to(dtype)  # [BH]
        p_w = p_weight + o_v[:, None].to(tl.int64) * stride_w + o_h[None, :]
        b_w = tl.load(p_w, mask=m_v[:, None] & (o_h < H)[None, :], other=0.0).to(dtype)
        b_z += tl.sum(b_w * b_x[None, :], axis=1)
    return finish_logits(b_z, p_bias, o_v, m_v, HAS_BIAS, SCALE, SOFTCAP, TEMPERATURE)


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
        "p_labels", "p_logps", "p_factors", "p_logsumexps", "p_statistics"
    ],
)  # fmt: skip
def finish_rows_kernel(
    p_hidden_states,  # [n, H]
    p_weight,  # [V, H]
    p_bias,  # [V]
    p_labels,  # [n] int64
    p_targets,  # [n], result of target_products_kernel
    p_d_logits,  # [n, V], rows `stride_d` apart
    p_sums,  # [1, num_tiles, n], with statistics [5, num_tiles, n]
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
    stride_d,
    MAX_REST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
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
        squares = squares / (_SQUARES_UNIT * _SQUARES_UNIT)
    if MEAN_LOGIT is not None:
        logit_sum = _row_sum(p_sums + 3 * plane, i_n, n, num_tiles, BT)
    if IS_TOP is not None:
        above = _row_sum(p_sums + 4 * plane, i_n, n, num_tiles, BT)
    label = tl.load(p_labels + i_n)
    target, slope = finish_logits(
        tl.load(p_targets + i_n), p_bias, label, True, HAS_BIAS, SCALE, SOFTCAP, TEMPERATURE
    )
    reference = target
    # Compute the row again with its maximum as k: first the maximum, then the sum. The comparison
    # is written as a negated <=, which is true for NaN, too.
    if (rest <= MAX_REST) == 0:
        p_x = p_hidden_states + i_n * stride_x
        reference = tl.full([], float("-inf"), dtype=dtype)
        for i_v in range(0, V, BV):
            o_v = i_v + tl.arange(0, BV)
            m_v = o_v < V
            b_z, _ = _row_logits(
                p_x, p_weight, p_bias, o_v, m_v, stride_w, H, dtype,
                HAS_BIAS, SCALE, SOFTCAP, TEMPERATURE, BV, BH,
            )  # fmt: skip
            reference = tl.maximum(reference, tl.max(tl.where(m_v, b_z, float("-inf")), axis=0))
        rest = tl.full([], 0.0, dtype=tl.float64)
        moment, squares = rest, rest
        for i_v in range(0, V, BV):
            o_v = i_v + tl.arange(0, BV)
            m_v = o_v < V
            b_z, b_slope = _row_logits(
                p_x, p_weight, p_bias, o_v, m_v, stride_w, H, dtype,
                HAS_BIAS, SCALE, SOFTCAP, TEMPERATURE, BV, BH,
            )  # fmt: skip
            m_rest = m_v & (o_v != label)
            b_e = tl.where(m_rest, tl.exp(b_z - reference), 0.0)
            rest += tl.sum(b_e.to(tl.float64), axis=0)
            if ENTROPY is not None:
                moment += tl.sum(moments(b_e, b_z - reference).to(tl.float64), axis=0)
            if LOG_SUM_P2 is not None:
                squares += tl.sum((b_e * b_e).to(tl.float64), axis=0)
            if KEEP:
                tl.store(p_d + o_v, (b_e * b_slope).to(p_d.dtype.element_ty), mask=m_rest)
    logp, factor = label_logp(target, reference, rest)
    tl.store(p_logps + i_n, logp.to(dtype))
    if KEEP:
        tl.store(p_factors + i_n, factor.to(dtype))
        # The label's entry exp(z_label - k) - S is written as -R, so no digits cancel.
        tl.store(p_d + label, (-rest.to(dtype) * slope).to(p_d.dtype.element_ty))
    else:
        tl.store(p_logsumexps + i_n, row_logsumexp(target, reference, rest).to(dtype))
    store_statistics(
        p_statistics, i_n, tl.num_programs(0), V, target, reference, above == 0.0,
        rest, moment, squares, logit_sum, ENTROPY, MEAN_LOGIT, IS_TOP, LOG_SUM_P2,
    )  # fmt: skip
