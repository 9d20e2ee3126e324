"""Back end "triton_fused": a matrix product that writes exp(z - k) and its sums, never logits.

z is a logit, and k is one reference value per row. Three kernels run one after the other:

    target_products   a dot product per row: the label's own logit, which serves as k
    score_tiles       the matrix product, tile by tile: exp(z - k), and its sum over each tile
    finish_rows       adds up a row's sums, which give its log-prob and the gradient at its label

With the label's logit as k, exp(z - k) is p / p_label, and its sum is 1 / p_label. So the row's
maximum isn't needed before the product. If the sum is above `MAX_REST` (the label's probability is
below 1e-28) or not finite, finish_rows computes the row again with the row's maximum as k.
"""

# jit functions can't be typed, and Triton and torch.cuda.device_of have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpofast_kernels.head.dtypes import accumulate_dtype, product_dtype
from dpofast_kernels.head.launch import is_interpreted, launch_options
from dpofast_kernels.head.logits_triton import (
    finish_logits,
    label_logp,
    logit_constants,
    row_logsumexp,
)
from dpofast_kernels.head.options import HeadOptions
from dpofast_kernels.head.pairs import Pairs, PairTerms
from dpofast_kernels.head.pairs_triton import pair_loss_fwd
from dpofast_kernels.head.rows import LogitGradients, ScoredRows

# exp(z - k) up to this bound, times hidden states or weights, stays far inside the range of fp32
# and bf16. So do the factors -1 / S (see `label_logp`), which scale it down again.
MAX_REST = 2.0**96


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
    p_sums,  # [tiles of V, n]
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
    KEEP: tl.constexpr,
    UPCAST: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Write exp(z - k) times the slope of z, and each tile's sum of exp(z - k) without the labels.

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
        tl.store(p_sums + i_n.to(tl.int64) * n + o_m, tl.sum(b_e, axis=1), mask=m_m)
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


@triton.jit(
    do_not_specialize=["n", "num_tiles"],
    do_not_specialize_on_alignment=["p_labels", "p_logps", "p_factors", "p_logsumexps"],
)
def finish_rows_kernel(
    p_hidden_states,  # [n, H]
    p_weight,  # [V, H]
    p_bias,  # [V]
    p_labels,  # [n] int64
    p_targets,  # [n], result of target_products_kernel
    p_d_logits,  # [n, V], rows `stride_d` apart
    p_sums,  # [num_tiles, n]
    p_logps,  # [n]
    p_factors,  # [n]
    p_logsumexps,  # [n], written only without KEEP
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
    KEEP: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BH: tl.constexpr,
):
    """Log-probs from the sums of the tiles, and the gradient at the label; one program per row.

    The sums are added in a fixed order: the same inputs give the same bits.
    """
    i_n = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = p_targets.dtype.element_ty
    p_d = p_d_logits + i_n * stride_d
    b_rest = tl.zeros([BT], dtype=tl.float64)
    for i_t in range(0, num_tiles, BT):
        o_t = i_t + tl.arange(0, BT)
        p_t = p_sums + o_t.to(tl.int64) * n + i_n
        b_rest += tl.load(p_t, mask=o_t < num_tiles, other=0.0).to(tl.float64)
    rest = tl.sum(b_rest, axis=0)
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


class FusedRows:
    """`RowOps` made of the three kernels above."""

    vocab_major = False  # the kernels write contiguous rows

    def __init__(self, weight: Tensor, options: HeadOptions) -> None:
        if weight.stride(1) != 1:
            raise ValueError(
                f"weight has strides {weight.stride()}, but backend 'triton_fused' expects rows "
                "without gaps: pass weight.contiguous(), or choose another backend."
            )
        if weight.dtype not in (torch.bfloat16, torch.float16) and not is_interpreted(
            score_tiles_kernel
        ):
            raise ValueError(
                f"weight is {weight.dtype}, but backend 'triton_fused' multiplies bfloat16 and "
                "float16 alone: choose backend 'triton' or 'auto'."
            )
        self.weight = weight
        self.bias = None if options.bias is None else options.bias.contiguous()
        self.constants = logit_constants(options)
        # A bias, the slopes of a cap and fp32 gradients need registers. The largest tiles leave no
        # register free, so these cases get smaller tiles.
        is_wide = self.bias is not None or options.softcap is not None
        is_wide = is_wide or weight.dtype != torch.bfloat16
        self.tile_entry = "score_tiles_wide" if is_wide else "score_tiles"

    def workspace_dtype(self, keep: bool) -> torch.dtype | None:
        return product_dtype(self.weight) if keep else None

    def score(
        self, hidden_states: Tensor, labels: Tensor, workspace: Tensor | None, keep: bool
    ) -> ScoredRows:
        weight, device = self.weight, self.weight.device
        hidden_states, labels = hidden_states.contiguous(), labels.contiguous()
        num_rows, (vocab_size, hidden_size) = len(labels), weight.shape
        tiles = launch_options(self.tile_entry, device)
        if not _are_aligned(hidden_states, weight):
            # Descriptors can't read such rows. Pointers need registers, so the tiles are smaller.
            tiles = {**launch_options("score_tiles_wide", device), "DESCRIPTORS": False}
        num_tiles = triton.cdiv(vocab_size, tiles["BN"])
        dtype = accumulate_dtype(weight.dtype)
        targets, logps, factors, logsumexps = weight.new_empty(4, num_rows, dtype=dtype).unbind()
        sums = weight.new_empty(num_tiles, num_rows, dtype=dtype)
        d_logits = workspace if keep else None
        p_bias = targets if self.bias is None else self.bias
        p_d_logits, stride_d = (targets, 0) if d_logits is None else (d_logits, d_logits.stride(0))
        strides = (hidden_states.stride(0), weight.stride(0))
        num_programs = _num_programs(device, triton.cdiv(num_rows, tiles["BM"]) * num_tiles)
        with torch.cuda.device_of(weight):
            target_products_kernel[(num_rows,)](
                hidden_states, weight, labels, targets, *strides, hidden_size,
                **launch_options("target_products", device),
            )  # fmt: skip
            score_tiles_kernel[(num_programs,)](
                *tile_sources(hidden_states, weight, tiles),
                p_bias, labels, targets, p_d_logits, sums,
                num_rows, vocab_size, hidden_size, *strides, stride_d, num_programs,
                **self.constants, KEEP=keep, UPCAST=is_interpreted(score_tiles_kernel), **tiles,
            )  # fmt: skip
            finish_rows_kernel[(num_rows,)](
                hidden_states, weight, p_bias, labels, targets, p_d_logits, sums,
                logps, factors, logsumexps,
                num_rows, vocab_size, hidden_size, num_tiles, *strides, stride_d,
                MAX_REST=MAX_REST, **self.constants, KEEP=keep,
                **launch_options("finish_rows", device),
            )  # fmt: skip
        if d_logits is None:
            return ScoredRows(logps, logsumexps=logsumexps)
        return ScoredRows(logps, (d_logits, factors))

    def differentiate(
        self, scored: ScoredRows, labels: Tensor, coefficients: Tensor
    ) -> LogitGradients:
        d_logits, factors = scored.kept
        return LogitGradients(d_logits, coefficients * factors)

    def pair_loss(self, per_token_logps: Tensor, pairs: Pairs) -> PairTerms:
        return pair_loss_fwd(per_token_logps, pairs)


def _are_aligned(*matrices: Tensor) -> bool:
    """Whether all rows begin at multiples of 16 bytes, as the hardware's block loads need."""
    return all(
        matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0
        for matrix in matrices
    )


def tile_sources(hidden_states: Tensor, weight: Tensor, tiles: dict[str, Any]) -> tuple[Any, Any]:
    """The inputs of score_tiles_kernel: descriptors of their blocks, or the tensors themselves."""
    if not tiles["DESCRIPTORS"]:
        return hidden_states, weight
    from triton.tools.tensor_descriptor import TensorDescriptor

    return (
        TensorDescriptor.from_tensor(hidden_states, [tiles["BM"], tiles["BK"]]),
        TensorDescriptor.from_tensor(weight, [tiles["BN"], tiles["BK"]]),
    )


def _num_programs(device: torch.device, num_tiles: int) -> int:
    return min(_num_cores(device), num_tiles)


@lru_cache(maxsize=16)
def _num_cores(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # any number: the interpreter runs programs one after another
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
