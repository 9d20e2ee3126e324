"""Statistics of each row's softmax in Triton: parts of kernels, with the formulas of statistics.py.

A kernel has one constexpr per statistic: the statistic's row in the output, or None if nobody asked
for it. Then its sums stay 0, and the compiler removes them.
"""

# jit functions can't have types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from dpofast_kernels.head.statistics import LOWEST, STATISTICS
from dpofast_kernels.preference.formulas_triton import log1p

_LOWEST = tl.constexpr(LOWEST)


def statistic_constants(statistics: tuple[str, ...]) -> dict[str, int | None]:
    """Constexprs of the kernels: ENTROPY, MEAN_LOGIT, IS_TOP and LOG_SUM_P2."""
    return {
        name.upper(): statistics.index(name) if name in statistics else None for name in STATISTICS
    }


@triton.jit
def moments(b_e, b_differences):
    """E (z - k), where E is exp(z - k), or 0 at the label; 0 where z is -inf."""
    return b_e * tl.maximum(b_differences, _LOWEST)


@triton.jit
def rescaled_moment(moment, rest, shift):
    """The sum of E (z - k + shift), given those of E (z - k) and E.

    k - shift is the next reference. The result still has to be multiplied by exp(shift). `shift`
    and the moment are at most 0, so no digits cancel.
    """
    return moment + rest * tl.maximum(shift, _LOWEST)


@triton.jit
def _beyond_one(rest, label, is_top):
    """rest + label - 1, where the largest term of the sum is 1; that is the label's if `is_top`."""
    beyond = tl.where(is_top, rest, rest - 1.0 + label)
    return tl.where(beyond < 0.0, 0.0, beyond)


@triton.jit
def store_statistics(
    p_statistics,  # [K, n]
    i_n,
    n,
    V,
    target,  # the label's logit, fp64
    reference,  # k, fp64
    is_top,  # whether the label's logit is the maximum
    rest,  # sum of E without the label
    moment,  # sum of E (z - k) without the label
    squares,  # sum of E^2 without the label
    logit_sum,  # sum of z
    ENTROPY: tl.constexpr,
    MEAN_LOGIT: tl.constexpr,
    IS_TOP: tl.constexpr,
    LOG_SUM_P2: tl.constexpr,
):
    """Store the statistics of row i_n, computed from its sums in fp64.

    k is the row's maximum, or it is the label's logit, whose E then is 1.
    """
    dtype: tl.constexpr = p_statistics.dtype.element_ty
    p_row = p_statistics + i_n
    gap = reference - target
    label = tl.exp(-gap)
    log_sum = log1p(_beyond_one(rest, label, gap <= 0.0))
    if ENTROPY is not None:
        moment += moments(label, -gap)
        found = log_sum - moment * (1.0 / (rest + label))
        tl.store(p_row + ENTROPY * n, tl.where(found < 0.0, 0.0, found).to(dtype))
    if MEAN_LOGIT is not None:
        tl.store(p_row + MEAN_LOGIT * n, (logit_sum / V).to(dtype))
    if IS_TOP is not None:
        tl.store(p_row + IS_TOP * n, is_top.to(dtype))
    if LOG_SUM_P2 is not None:
        squares = _beyond_one(squares, label * label, gap <= 0.0)
        found = log1p(squares) - 2.0 * log_sum
        tl.store(p_row + LOG_SUM_P2 * n, tl.where(found > 0.0, 0.0, found).to(dtype))
