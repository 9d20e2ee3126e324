"""The pair losses as jit functions. Their formulas are those of sigmoid.py, hinge.py and ipo.py.

Each function takes the chosen and the rejected log-ratio, the chosen and the rejected length, beta
and label_smoothing, all fp64 scalars. It returns loss, d loss / d chosen log-ratio and d loss / d
rejected log-ratio.
"""

# jit functions can't have types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def softplus(x):
    """log(1 + exp(x)) for any x, exact to rounding even if the result is close to 0."""
    e = tl.exp(-tl.abs(x))
    one_more = 1.0 + e
    # 1 + e rounds away digits of e. The quotient brings them back (W. Kahan's log1p).
    rounded = one_more - 1.0
    log1p = tl.where(
        rounded == 0.0, e, tl.log(one_more) * (e / tl.where(rounded == 0.0, 1.0, rounded))
    )
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def _sigmoid_formula(chosen, rejected, chosen_length, rejected_length, beta, smoothing):
    margin = beta * (chosen - rejected)
    loss = (1.0 - smoothing) * softplus(-margin) + smoothing * softplus(margin)
    slope = beta * (smoothing * _sigmoid(margin) - (1.0 - smoothing) * _sigmoid(-margin))
    return loss, slope, -slope


@triton.jit
def _hinge_formula(chosen, rejected, chosen_length, rejected_length, beta, smoothing):
    gap = 1.0 - beta * (chosen - rejected)
    slope = tl.where(gap > 0.0, -beta, 0.0)
    return tl.where(gap <= 0.0, 0.0, gap), slope, -slope  # tl.maximum would hide a NaN


@triton.jit
def _ipo_formula(chosen, rejected, chosen_length, rejected_length, beta, smoothing):
    distance = chosen / chosen_length - rejected / rejected_length - 0.5 / beta
    return distance * distance, 2.0 * distance / chosen_length, -2.0 * distance / rejected_length


# Formulas by the name of their loss. A test compares the keys with those of the registry.
FORMULAS: dict[str, Any] = {
    "sigmoid": _sigmoid_formula,
    "hinge": _hinge_formula,
    "ipo": _ipo_formula,
}
