"""Back end "triton": torch.mm makes a chunk's logits, and Triton kernels work on their rows.

    score_rows    one pass over the logits: exp(z - k) in their place, and its sum over each row
    finish_rows   a row's log-prob and the gradient at its label; finish_triton explains it

z is a logit, and k is the label's own. exp(z - k) is in the dtype of the products that follow, and
1 / S, which makes probabilities of it, goes into the factors of the rows.
"""

# jit functions can't be typed, and Triton and torch.cuda.device_of have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpofast_kernels.head.dtypes import accumulate_dtype, product_dtype
from dpofast_kernels.head.finish_triton import SQUARES_UNIT, finish_rows_fwd, new_sums
from dpofast_kernels.head.launch import launch_options
from dpofast_kernels.head.logits_triton import (
    exponents,
    logit_constants,
    scaled,
    unscaled_logits,
)
from dpofast_kernels.head.matmul import logits_into
from dpofast_kernels.head.options import HeadOptions
from dpofast_kernels.head.pairs import Pairs, PairTerms, SequenceTerms
from dpofast_kernels.head.pairs_triton import pair_loss_fwd
from dpofast_kernels.head.rows import LogitGradients, ScoredRows
from dpofast_kernels.head.singles import Singles
from dpofast_kernels.head.singles_triton import sequence_loss_fwd
from dpofast_kernels.head.statistics_triton import moments, statistic_constants


@triton.jit
def _add_block(
    b_rest,
    moment,
    squares,
    logit_sum,
    above,
    p_row,
    p_d_row,
    p_bias,
    label,
    x_label,
    i_v,
    V,
    HAS_BIAS: tl.constexpr,
    CAP: tl.constexpr,
    UNIT: tl.constexpr,
    ENTROPY: tl.constexpr,
    MEAN_LOGIT: tl.constexpr,
    IS_TOP: tl.constexpr,
    LOG_SUM_P2: tl.constexpr,
    KEEP: tl.constexpr,
    BV: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    """Add a block to the sums, which are those of `new_sums`; with KEEP, overwrite its logits.

    The first sum stays spread over a block until the row's end. The others would need too many
    registers for that.
    """
    o_v = i_v + tl.arange(0, BV)
    m_v = None if IS_WHOLE else o_v < V
    b_z = tl.load(p_row + o_v, mask=m_v)  # [BV]
    b_x, b_slope = unscaled_logits(b_z, p_bias, o_v, m_v, HAS_BIAS, CAP)
    b_exponent = exponents(b_x, scaled(x_label, UNIT), UNIT)
    b_e = tl.exp2(b_exponent)
    if not IS_WHOLE:
        b_e = tl.where(m_v, b_e, 0.0)
    if label // BV == i_v // BV:  # in one block of the row
        b_e = tl.where(o_v == label, 0.0, b_e)
    b_rest += b_e
    if ENTROPY is not None:
        moment += tl.sum(moments(b_e, b_exponent), axis=0)
    if LOG_SUM_P2 is not None:
        b_scaled = b_e * SQUARES_UNIT
        squares += tl.sum(b_scaled * b_scaled, axis=0)
    if MEAN_LOGIT is not None:
        logit_sum += tl.sum(b_x if IS_WHOLE else tl.where(m_v, b_x, 0.0), axis=0)
    if IS_TOP is not None:
        # A negated <= counts NaN, too. The label's own logit isn't above itself.
        m_above = (b_x <= x_label) == 0
        if not IS_WHOLE:
            m_above = m_above & m_v
        above += tl.sum(tl.where(o_v == label, 0.0, m_above.to(b_x.dtype)), axis=0)
    if KEEP:
        # If the gradients have a narrower dtype, they are written over logits of this block or of
        # an earlier one. So all threads must have read their logits before any thread writes.
        tl.debug_barrier()
        tl.store(p_d_row + o_v, (b_e * b_slope).to(p_d_row.dtype.element_ty), mask=m_v)
    return b_rest, moment, squares, logit_sum, above


# Labels are slices, so their alignment changes with n. Specialising on it would compile the kernel
# again for each alignment.
@triton.jit(do_not_specialize_on_alignment=["p_labels", "p_targets", "p_sums"])
def score_rows_kernel(
    p_logits,  # [n, V], rows `stride` apart
    p_d_logits,  # [n, V], rows `stride_d` apart, in the memory of the logits; only with KEEP
    p_bias,  # [V]
    p_labels,  # [n] int64
    p_targets,  # [n]
    p_sums,  # [1, 1, n], with statistics [5, 1, n]; see `new_sums`
    stride,
    stride_d,
    V,
    HAS_BIAS: tl.constexpr,
    CAP: tl.constexpr,
    UNIT: tl.constexpr,
    SLOPE: tl.constexpr,
    ENTROPY: tl.constexpr,
    MEAN_LOGIT: tl.constexpr,
    IS_TOP: tl.constexpr,
    LOG_SUM_P2: tl.constexpr,
    KEEP: tl.constexpr,
    BV: tl.constexpr,
):
    """The label's product, sums of exp(z - k), and exp(z - k) times the slope of tanh in place.

    There is one program per row. It does the blocks in order: gradients of a narrower dtype end up
    in the first part of the row's memory. Only the last block is masked. All others can be read in
    wide words, whatever V is.
    """
    i_n = tl.program_id(0).to(tl.int64)  # offsets up to n * V exceed int32
    n = tl.num_programs(0).to(tl.int64)
    dtype: tl.constexpr = p_logits.dtype.element_ty
    p_row, p_d_row = p_logits + i_n * stride, p_d_logits + i_n * stride_d
    label = tl.load(p_labels + i_n).to(tl.int32)
    target = tl.load(p_row + label)
    tl.store(p_targets + i_n, target)
    x_label, _ = unscaled_logits(target, p_bias, label, True, HAS_BIAS, CAP)
    b_rest = tl.zeros([BV], dtype=dtype)
    moment = tl.full([], 0.0, dtype=dtype)
    squares, logit_sum, above = moment, moment, moment
    end = V // BV * BV
    for i_v in range(0, end, BV):
        b_rest, moment, squares, logit_sum, above = _add_block(
            b_rest, moment, squares, logit_sum, above, p_row, p_d_row, p_bias, label, x_label,
            i_v, V, HAS_BIAS, CAP, UNIT, ENTROPY, MEAN_LOGIT, IS_TOP, LOG_SUM_P2, KEEP, BV, True,
        )  # fmt: skip
    if end < V:
        b_rest, moment, squares, logit_sum, above = _add_block(
            b_rest, moment, squares, logit_sum, above, p_row, p_d_row, p_bias, label, x_label,
            end, V, HAS_BIAS, CAP, UNIT, ENTROPY, MEAN_LOGIT, IS_TOP, LOG_SUM_P2, KEEP, BV, False,
        )  # fmt: skip
    p_sum = p_sums + i_n
    tl.store(p_sum, tl.sum(b_rest, axis=0))
    if ENTROPY is not None:
        tl.store(p_sum + n, moment)
    if LOG_SUM_P2 is not None:
        tl.store(p_sum + 2 * n, squares)
    if MEAN_LOGIT is not None:
        tl.store(p_sum + 3 * n, logit_sum)
    if IS_TOP is not None:
        tl.store(p_sum + 4 * n, above)


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
        self.constants = {**logit_constants(options), **statistic_constants(statistics)}

    def workspace_dtype(self, keep: bool) -> torch.dtype:
        return accumulate_dtype(self.weight.dtype)

    def score(
        self, hidden_states: Tensor, labels: Tensor, workspace: Tensor | None, keep: bool
    ) -> ScoredRows:
        assert workspace is not None
        hidden_states, labels = hidden_states.contiguous(), labels.contiguous()
        logits = logits_into(workspace, hidden_states, self.weight)  # [n, V]
        d_logits = _in_place(logits, product_dtype(self.weight)) if keep else None
        targets = logits.new_empty(len(logits))
        sums = new_sums(targets, 1, len(logits), bool(self.statistics))
        with torch.cuda.device_of(logits):
            score_rows_kernel[(len(logits),)](
                logits,
                logits if d_logits is None else d_logits,
                logits if self.bias is None else self.bias,
                labels,
                targets,
                sums,
                logits.stride(0),
                0 if d_logits is None else d_logits.stride(0),
                logits.shape[1],
                **self.constants,
                KEEP=keep,
                **launch_options("score_rows", logits.device),
            )
        return finish_rows_fwd(
            hidden_states, self.weight, self.bias, labels, targets, d_logits, sums,
            self.statistics, self.constants,
        )  # fmt: skip

    def differentiate(
        self, scored: ScoredRows, labels: Tensor, coefficients: Tensor
    ) -> LogitGradients:
        d_logits, factors = scored.kept
        return LogitGradients(d_logits, coefficients * factors)

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
