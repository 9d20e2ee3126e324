"""Back end "triton": torch.mm makes a chunk's logits, and two Triton kernels work on their rows.

The first kernel turns logits into log-probs. Once the losses of the pairs are known, the second
kernel overwrites the fp32 logits with their gradients, times the coefficient of each row. So a bf16
gradient is rounded once, as in PyTorch.
"""

# jit functions can't be typed, and Triton and torch.cuda.device_of have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpofast_kernels.head.dtypes import accumulate_dtype, product_dtype
from dpofast_kernels.head.launch import launch_options
from dpofast_kernels.head.logits_triton import (
    finish_logits,
    label_logp,
    logit_constants,
    row_logsumexp,
)
from dpofast_kernels.head.matmul import logits_into
from dpofast_kernels.head.options import HeadOptions
from dpofast_kernels.head.pairs import Pairs, PairTerms, SequenceTerms
from dpofast_kernels.head.pairs_triton import pair_loss_fwd
from dpofast_kernels.head.rows import LogitGradients, ScoredRows
from dpofast_kernels.head.singles import Singles
from dpofast_kernels.head.singles_triton import sequence_loss_fwd
from dpofast_kernels.head.statistics_triton import (
    moments,
    rescaled_moment,
    statistic_constants,
    store_statistics,
)


@triton.jit
def _fold_block(
    row_max,
    rest,
    moment,
    squares,
    logit_sum,
    p_row,
    p_bias,
    label,
    i_v,
    V,
    HAS_BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    MEAN_LOGIT: tl.constexpr,
    LOG_SUM_P2: tl.constexpr,
    BV: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    """Add a block of logits to the running maximum and to the running sums.

    The first three sums are those of E = exp(z - maximum), E (z - maximum) and E^2, of all tokens
    except the label. They are rescaled whenever the maximum grows. The last one is that of z.
    """
    o_v = i_v + tl.arange(0, BV)
    m_v = None if IS_WHOLE else o_v < V
    b_z = tl.load(p_row + o_v, mask=m_v)  # [BV]
    b_z, _ = finish_logits(b_z, p_bias, o_v, m_v, HAS_BIAS, SCALE, SOFTCAP, TEMPERATURE)
    if not IS_WHOLE:
        b_z = tl.where(m_v, b_z, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(b_z, axis=0))
    # If a bias rules out all tokens so far, the maximum is -inf, and -inf - -inf would be NaN.
    reference = tl.where(new_max == float("-inf"), 0.0, new_max)
    b_e = tl.where(o_v == label, 0.0, tl.exp(b_z - reference))
    shift = row_max - reference
    scale = tl.exp(shift)
    if MEAN_LOGIT is not None:
        logit_sum += tl.sum(b_z if IS_WHOLE else tl.where(m_v, b_z, 0.0), axis=0)
    if ENTROPY is not None:
        moment = rescaled_moment(moment, rest, shift) * scale
        moment += tl.sum(moments(b_e, b_z - reference), axis=0)
    rest = rest * scale + tl.sum(b_e, axis=0)
    if LOG_SUM_P2 is not None:
        squares = squares * scale * scale + tl.sum(b_e * b_e, axis=0)
    return new_max, rest, moment, squares, logit_sum


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
    """Overwrite a block of logits with factor * slope of z * exp(z - maximum).

    At the label, -rest replaces exp(z - maximum).
    """
    o_v = i_v + tl.arange(0, BV)
    m_v = None if IS_WHOLE else o_v < V
    b_z = tl.load(p_row + o_v, mask=m_v)  # [BV]
    b_z, b_slope = finish_logits(b_z, p_bias, o_v, m_v, HAS_BIAS, SCALE, SOFTCAP, TEMPERATURE)
    b_d = tl.where(o_v == label, -rest, tl.exp(b_z - row_max)) * b_slope * factor
    # If the gradients have a narrower dtype, they are written over logits of this block or of an
    # earlier one. So all threads must have read their logits before any thread writes.
    tl.debug_barrier()
    tl.store(p_d_row + o_v, b_d.to(p_d_row.dtype.element_ty), mask=m_v)


# Labels are slices, and the outputs are rows of one tensor, so their alignment changes with n.
# Specialising on it would compile the kernel again for each alignment.
@triton.jit(
    do_not_specialize_on_alignment=[
        "p_labels", "p_logps", "p_row_max", "p_rest", "p_factors", "p_logsumexps", "p_statistics"
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
    p_logsumexps,  # [n], written only without KEEP
    p_statistics,  # [K, n]
    stride,
    V,
    HAS_BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    MEAN_LOGIT: tl.constexpr,
    IS_TOP: tl.constexpr,
    LOG_SUM_P2: tl.constexpr,
    KEEP: tl.constexpr,
    BV: tl.constexpr,
):
    """Log-softmax at the label, the numbers that its gradient needs, and statistics.

    There is one program per row. Only the last block is masked. All others can be read in wide
    words, whatever V is.
    """
    i_n = tl.program_id(0).to(tl.int64)  # offsets up to n * V exceed int32
    dtype: tl.constexpr = p_logits.dtype.element_ty
    p_row = p_logits + i_n * stride
    label = tl.load(p_labels + i_n)
    row_max = tl.full([], float("-inf"), dtype=dtype)
    rest = tl.full([], 0.0, dtype=dtype)
    moment, squares, logit_sum = rest, rest, rest
    end = V // BV * BV
    for i_v in range(0, end, BV):
        row_max, rest, moment, squares, logit_sum = _fold_block(
            row_max, rest, moment, squares, logit_sum, p_row, p_bias, label, i_v, V,
            HAS_BIAS, SCALE, SOFTCAP, TEMPERATURE, ENTROPY, MEAN_LOGIT, LOG_SUM_P2, BV, True,
        )  # fmt: skip
    if end < V:
        row_max, rest, moment, squares, logit_sum = _fold_block(
            row_max, rest, moment, squares, logit_sum, p_row, p_bias, label, end, V,
            HAS_BIAS, SCALE, SOFTCAP, TEMPERATURE, ENTROPY, MEAN_LOGIT, LOG_SUM_P2, BV, False,
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
    store_statistics(
        p_statistics, tl.program_id(0), tl.num_programs(0), V, target, row_max, target == row_max,
        rest, moment, squares, logit_sum, ENTROPY, MEAN_LOGIT, IS_TOP, LOG_SUM_P2,
    )  # fmt: skip


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
    """Overwrite logits with their gradients; one program per row.

    Gradients of a narrower dtype end up in the first part of the row's memory. So one program must
    do the blocks of a row, in order.
    """
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
    """`RowOps` made of a matrix product and two Triton kernels over its rows."""

    # The kernels read contiguous rows. Another reason: the interpreter copies the whole storage
    # behind each tensor, and the memory that vocab_major keeps for each thread is large.
    vocab_major = False

    def __init__(
        self, weight: Tensor, options: HeadOptions, statistics: tuple[str, ...] = ()
    ) -> None:
        self.weight, self.statistics = weight, statistics
        self.bias = None if options.bias is None else options.bias.contiguous()
        self.constants = logit_constants(options)
        self.statistic_constants = statistic_constants(statistics)

    def workspace_dtype(self, keep: bool) -> torch.dtype:
        return accumulate_dtype(self.weight.dtype)

    def score(
        self, hidden_states: Tensor, labels: Tensor, workspace: Tensor | None, keep: bool
    ) -> ScoredRows:
        assert workspace is not None
        logits = logits_into(workspace, hidden_states, self.weight)  # [n, V]
        logps, row_max, rest, factors, logsumexps = logits.new_empty(5, len(logits)).unbind()
        found = None
        if self.statistics:
            found = logits.new_empty(len(self.statistics), len(logits))  # [K, n]
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
                logps if found is None else found,
                logits.stride(0),
                logits.shape[1],
                **self.constants,
                **self.statistic_constants,
                KEEP=keep,
                **launch_options("score_rows", logits.device),
            )
        if not keep:
            return ScoredRows(logps, (), logsumexps, found)
        return ScoredRows(logps, (logits, row_max, rest, factors), statistics=found)

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

    def pair_loss(self, per_token_logps: Tensor, pairs: Pairs) -> PairTerms:
        return pair_loss_fwd(per_token_logps, pairs)

    def sequence_loss(self, per_token_logps: Tensor, singles: Singles) -> SequenceTerms:
        return sequence_loss_fwd(per_token_logps, singles)


def _in_place(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """A view of the logits' memory as [n, V] in another dtype; the rows begin where they began."""
    if dtype == logits.dtype:
        return logits
    num_rows, vocab_size = logits.shape
    # PyTorch can't view a slice of columns as another dtype. So view the rows with the gaps between
    # them first, and slice off the gaps last.
    whole = logits.as_strided((num_rows, logits.stride(0)), (logits.stride(0), 1))
    return whole.view(dtype)[:, :vocab_size]
