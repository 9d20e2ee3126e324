"""The first two kernels of the back end "triton_fused", which fused_triton explains."""

# jit functions can't be typed.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from dpofast_kernels.head.finish_triton import SQUARES_UNIT
from dpofast_kernels.head.logits_triton import exponents, scaled, unscaled_logits
from dpofast_kernels.head.statistics_triton import moments


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
# specialised on them, it would compile the kernel again and again. The alignment of V would gain
# nothing, and the compiler needs more registers if it knows it.
@triton.jit(
    do_not_specialize=["n", "num_programs"], do_not_specialize_on_alignment=["p_labels", "V"]
)
def score_tiles_kernel(
    hidden_states,  # [n, H]: a descriptor of blocks [BM, BK], or a pointer
    weight,  # [V, H]: a descriptor of blocks [BN, BK], or a pointer
    d_logits,  # [n, V]: a descriptor of blocks [BM, BN], or a pointer to rows `stride_d` apart
    p_bias,  # [V]
    p_labels,  # [n] int64
    p_targets,  # [n], result of target_products_kernel
    p_sums,  # [1, tiles of V, n], with statistics [5, tiles of V, n]; see `new_sums`
    n,
    V,
    H,
    stride_x,
    stride_w,
    stride_d,
    num_programs,
    HAS_BIAS: tl.constexpr,
    CAP: tl.constexpr,
    UNIT: tl.constexpr,
    SLOPE: tl.constexpr,
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
    """Write exp(z - k) times the slope of tanh, and each tile's sums.

    The kernel is persistent: each program takes every num_programs-th tile. Tiles are numbered in
    bands of GROUP row blocks, column by column inside a band. So tiles that run at the same time
    read the same hidden states and weights, and find them in the cache.

    Most tiles lie within the vocabulary and contain no row's label. Only the others are masked.
    """
    dtype: tl.constexpr = p_targets.dtype.element_ty
    HAS_STATISTICS: tl.constexpr = (
        ENTROPY is not None
        or MEAN_LOGIT is not None
        or IS_TOP is not None
        or LOG_SUM_P2 is not None
    )
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
        b_label = tl.load(p_labels + o_m, mask=m_m, other=0).to(tl.int32)  # [BM]
        b_target = tl.load(p_targets + o_m, mask=m_m, other=0.0)
        b_target, _ = unscaled_logits(b_target, p_bias, b_label, m_m, HAS_BIAS, CAP)
        b_x, b_slope = unscaled_logits(b_z, p_bias, o_v[None, :], m_v[None, :], HAS_BIAS, CAP)
        b_exponent = exponents(b_x, scaled(b_target, UNIT)[:, None], UNIT)
        b_e = tl.exp2(b_exponent)
        if HAS_STATISTICS:
            # The other sums need registers, which a branch around the mask would need, too.
            b_e = tl.where(m_v[None, :] & (o_v[None, :] != b_label[:, None]), b_e, 0.0)
        else:
            is_whole = i_n * BN + BN <= V
            has_label = tl.max((b_label // BN == i_n).to(tl.int32), axis=0) > 0
            if has_label | (not is_whole):
                b_e = tl.where(m_v[None, :] & (o_v[None, :] != b_label[:, None]), b_e, 0.0)
        p_tile = p_sums + i_n.to(tl.int64) * n + o_m
        plane = tl.cast(num_n, tl.int64) * n
        tl.store(p_tile, tl.sum(b_e, axis=1), mask=m_m)
        if ENTROPY is not None:
            tl.store(p_tile + plane, tl.sum(moments(b_e, b_exponent), axis=1), mask=m_m)
        if LOG_SUM_P2 is not None:
            b_scaled = b_e * SQUARES_UNIT
            tl.store(p_tile + 2 * plane, tl.sum(b_scaled * b_scaled, axis=1), mask=m_m)
        if MEAN_LOGIT is not None:
            b_sum = tl.sum(tl.where(m_v[None, :], b_x, 0.0), axis=1)
            tl.store(p_tile + 3 * plane, b_sum, mask=m_m)
        if IS_TOP is not None:
            m_rest = m_v[None, :] & (o_v[None, :] != b_label[:, None])
            # A negated <= counts NaN, too.
            m_above = m_rest & ((b_x <= b_target[:, None]) == 0)
            tl.store(p_tile + 4 * plane, tl.sum(m_above.to(dtype), axis=1), mask=m_m)
        if KEEP:
            b_d = (b_e * b_slope).to(d_logits.dtype if DESCRIPTORS else d_logits.dtype.element_ty)
            if DESCRIPTORS:
                # The copy engine leaves out what lies beyond the last row or column.
                d_logits.store([i_m, i_n * BN], b_d)
            else:
                p_d = d_logits + o_m[:, None].to(tl.int64) * stride_d + o_v[None, :]
                # Rows of the workspace are padded. With zeros beyond the vocabulary, too, the words
                # are wide whatever V is.
                end = tl.minimum(tl.cdiv(V, 16) * 16, stride_d)
                tl.store(p_d, b_d, mask=m_m[:, None] & (o_v < end)[None, :])
