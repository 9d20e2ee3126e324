"""Way A: a chunk's logits by the library's own product, then Triton kernels over its rows.

One makes log-probs. Once the pairs' losses are known, another makes gradients of the fp32 logits,
times the coefficient of each row: rounded to bf16 once, as PyTorch's own are.
"""

# jit functions can't be typed, and Triton and torch.cuda.device_of are not
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpofast_kernels.head.launch import launch_options
from dpofast_kernels.head.logits_triton import (
    finish_logits,
    label_logp,
    logit_constants,
    row_logsumexp,
)
from dpofast_kernels.head.matmul import accumulate_dtype, logits_into, product_dtype
from dpofast_kernels.head.options import HeadOptions
from dpofast_kernels.head.pairs_triton import pair_loss_fwd
from dpofast_kernels.head.rows import LogitGradients, PairTerms, ScoredRows
from dpofast_kernels.preference import PairLoss


@triton.jit
def _fold_block(
    row_max,
    rest,
    p_row,
    p_bias,
    label,
    i_v,
    V,
    HAS_BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    BV: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    """Maximum, and sum of exp(z - maximum) without the label's own, with one more block."""
    o_v = i_v + tl.arange(0, BV)
    m_v = None if IS_WHOLE else o_v < V
    b_z = tl.load(p_row + o_v, mask=m_v)  # [BV]
    b_z, _ = finish_logits(b_z, p_bias, o_v, m_v, HAS_BIAS, SCALE, SOFTCAP, TEMPERATURE)
    if not IS_WHOLE:
        b_z = tl.where(m_v, b_z, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(b_z, axis=0))
    # a block of -inf alone, as from a bias that rules tokens out, has no maximum to subtract
    reference = tl.where(new_max == float("-inf"), 0.0, new_max)
    b_e = tl.where(o_v == label, 0.0, tl.exp(b_z - reference))
    rest = rest * tl.exp(row_max - reference) + tl.sum(b_e, axis=0)
    return new_max, rest


@triton.jit
def _store_block(
    row_max,
    rest,
    factor,
    p_row,
    p_d_row,
    p_bias,
    label,
    i_v,
    V,
    HAS_BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    BV: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    """factor exp(z - maximum) times the slope of z, in place of a block of logits."""
    o_v = i_v + tl.arange(0, BV)
    m_v = None if IS_WHOLE else o_v < V
    b_z = tl.load(p_row + o_v, mask=m_v)  # [BV]
    b_z, b_slope = finish_logits(b_z, p_bias, o_v, m_v, HAS_BIAS, SCALE, SOFTCAP, TEMPERATURE)
    b_d = tl.where(o_v == label, -rest, tl.exp(b_z - row_max)) * b_slope * factor
    # A narrower dtype's block lies where this block's or an earlier one's logits do: all threads
    # must have read theirs.
    tl.debug_barrier()
    tl.store(p_d_row + o_v, b_d.to(p_d_row.dtype.element_ty), mask=m_v)


@triton.jit(
    do_not_specialize_on_alignment=[
        "p_labels", "p_logps", "p_row_max", "p_rest", "p_factors", "p_logsumexps"
    ]
)  # fmt: skip
def score_rows_kernel(
    p_logits,  # [n, V], rows `stride` apart
    p_bias,  # [V]
    p_labels,  # [n] int64
    p_logps,  # [n]
    p_row_max,  # [n]
    p_rest,  # [n]
    p_factors,  # [n]
    p_logsumexps,  # [n], without KEEP
    stride,
    V,
    HAS_BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    KEEP: tl.constexpr,
    BV: tl.constexpr,
):
    """Log-softmax at the label, and the numbers that its gradient needs; one program a row.

    Whole blocks go without masks, so that any V is read in wide words.
    """
    i_n = tl.program_id(0).to(tl.int64)  # n V passes 2^31
    dtype: tl.constexpr = p_logits.dtype.element_ty
    p_row = p_logits + i_n * stride
    label = tl.load(p_labels + i_n)
    row_max = tl.full([], float("-inf"), dtype=dtype)
    rest = tl.full([], 0.0, dtype=dtype)
    end = V // BV * BV
    for i_v in range(0, end, BV):
        row_max, rest = _fold_block(
            row_max, rest, p_row, p_bias, label, i_v, V,
            HAS_BIAS, SCALE, SOFTCAP, TEMPERATURE, BV, True,
        )  # fmt: skip
    if end < V:
        row_max, rest = _fold_block(
            row_max, rest, p_row, p_bias, label, end, V,
            HAS_BIAS, SCALE, SOFTCAP, TEMPERATURE, BV, False,
        )  # fmt: skip
    target = tl.load(p_row + label)
    target, _ = finish_logits(target, p_bias, label, True, HAS_BIAS, SCALE, SOFTCAP, TEMPERATURE)
    logp, factor = label_logp(target, row_max, rest)
    tl.store(p_logps + i_n, logp.to(dtype))
    if KEEP:
        tl.store(p_row_max + i_n, row_max)
        tl.store(p_rest + i_n, rest)
        tl.store(p_factors + i_n, factor.to(dtype))
    else:
        tl.store(p_logsumexps + i_n, row_logsumexp(target, row_max, rest).to(dtype))


@triton.jit(do_not_specialize_on_alignment=["p_labels", "p_row_max", "p_rest", "p_factors"])
def differentiate_rows_kernel(
    p_logits,  # [n, V], rows `stride` apart
    p_d_logits,  # [n, V], rows `d_stride` apart, in the memory of the logits
    p_bias,  # [V]
    p_labels,  # [n] int64
    p_row_max,  # [n]
    p_rest,  # [n]
    p_factors,  # [n]
    stride,
    d_stride,
    V,
    HAS_BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    BV: tl.constexpr,
):
    """Gradients in place of logits; one program a row, as narrow ones move to its beginning."""
    i_n = tl.program_id(0).to(tl.int64)
    p_row, p_d_row = p_logits + i_n * stride, p_d_logits + i_n * d_stride
    label = tl.load(p_labels + i_n)
    row_max, rest = tl.load(p_row_max + i_n), tl.load(p_rest + i_n)
    factor = tl.load(p_factors + i_n)
    end = V // BV * BV
    for i_v in range(0, end, BV):
        _store_block(
            row_max, rest, factor, p_row, p_d_row, p_bias, label, i_v, V,
            HAS_BIAS, SCALE, SOFTCAP, TEMPERATURE, BV, True,
        )  # fmt: skip
    if end < V:
        _store_block(
            row_max, rest, factor, p_row, p_d_row, p_bias, label, end, V,
            HAS_BIAS, SCALE, SOFTCAP, TEMPERATURE, BV, False,
        )  # fmt: skip


class TritonRows:
    """`RowOps` of a matrix product and a Triton kernel over its rows."""

    def __init__(self, weight: Tensor, options: HeadOptions) -> None:
        self.weight = weight
        self.bias = None if options.bias is None else options.bias.contiguous()
        self.constants = logit_constants(options)

    def workspace_dtype(self, keep: bool) -> torch.dtype:
        return accumulate_dtype(self.weight.dtype)

    def score(
        self, hidden_states: Tensor, labels: Tensor, workspace: Tensor | None, keep: bool
    ) -> ScoredRows:
        assert workspace is not None
        logits = logits_into(workspace, hidden_states, self.weight)  # [n, V]
        logps, row_max, rest, factors, logsumexps = logits.new_empty(5, len(logits)).unbind()
        with torch.cuda.device_of(logits):
            score_rows_kernel[(len(logits),)](
                logits,
                logits if self.bias is None else self.bias,
                labels.contiguous(),
                logps,
                row_max,
                rest,
                factors,
                logsumexps,
                logits.stride(0),
                logits.shape[1],
                **self.constants,
                KEEP=keep,
                **launch_options("score_rows", logits.device),
            )
        if not keep:
            return ScoredRows(logps, logsumexps=logsumexps)
        return ScoredRows(logps, (logits, row_max, rest, factors))

    def differentiate(
        self, scored: ScoredRows, labels: Tensor, coefficients: Tensor
    ) -> LogitGradients:
        logits, row_max, rest, factors = scored.kept
        d_logits = _in_place(logits, product_dtype(self.weight))
        with torch.cuda.device_of(logits):
            differentiate_rows_kernel[(len(logits),)](
                logits,
                d_logits,
                logits if self.bias is None else self.bias,
                labels.contiguous(),
                row_max,
                rest,
                coefficients * factors,
                logits.stride(0),
                d_logits.stride(0),
                logits.shape[1],
                **self.constants,
                **launch_options("differentiate_rows", logits.device),
            )
        return LogitGradients(d_logits, None)

    def pair_loss(
        self, per_token_logps: Tensor, bounds: Tensor, ref_logps: Tensor, loss: PairLoss
    ) -> PairTerms:
        return pair_loss_fwd(per_token_logps, bounds, ref_logps, loss)


def _in_place(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows' memory as rows of another dtype, each at the start of its row."""
    if dtype == logits.dtype:
        return logits
    num_rows, vocab_size = logits.shape
    # a slice of columns can't be viewed as another dtype, so all of the memory is
    whole = logits.as_strided((num_rows, logits.stride(0)), (logits.stride(0), 1))
    return whole.view(dtype)[:, :vocab_size]


def is_interpreted() -> bool:
    """Whether the kernels run on CPU tensors; Triton decides that when it makes them."""
    return not isinstance(score_rows_kernel, triton.JITFunction)
