"""The pair losses as jit functions. Each formula is that of the loss's class in this folder.

Each function takes the chosen and the rejected log-ratio, the chosen and the rejected length, beta,
label_smoothing and the loss's own option (0 if it has none), all fp64 scalars. It returns loss,
d loss / d chosen log-ratio and d loss / d rejected log-ratio.
"""

# jit functions can't have types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def log1p(x):
    """log(1 + x) for x > -1, exact to rounding even if the result is close to 0."""
    one_more = 1.0 + x
    # 1 + x rounds away digits of x. The quotient brings them back (W. Kahan's log1p).
    rounded = one_more - 1.0
    return tl.where(
        rounded == 0.0, x, tl.log(one_more) * (x / tl.where(rounded == 0.0, 1.0, rounded))
    )


@triton.jit
def softplus(x):
    """log(1 + exp(x)) for any x, exact to rounding even if the result is close to 0."""
    return tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def _bell(x):
    """The derivative of sigmoid."""
    return _sigmoid(x) * _sigmoid(-x)


@triton.jit
def _logistic(margin, smoothing):
    """DPO's loss of a margin, with smoothed labels, and its derivative."""
    loss = (1.0 - smoothing) * softplus(-margin) + smoothing * softplus(margin)
    return loss, smoothing * _sigmoid(margin) - (1.0 - smoothing) * _sigmoid(-margin)


@triton.jit
def _sigmoid_formula(chosen, rejected, chosen_length, rejected_length, beta, smoothing, option):
    loss, slope = _logistic(beta * (chosen - rejected), smoothing)
    return loss, beta * slope, -beta * slope


@triton.jit
def _sigmoid_norm_formula(
    chosen, rejected, chosen_length, rejected_length, beta, smoothing, option
):
    # Two quotients rather than four: each is a call in fp64, and registers around it would spill.
    chosen_weight, rejected_weight = beta / chosen_length, beta / rejected_length
    loss, slope = _logistic(chosen * chosen_weight - rejected * rejected_weight, smoothing)
    return loss, slope * chosen_weight, -slope * rejected_weight


@triton.jit
def _hinge_formula(chosen, rejected, chosen_length, rejected_length, beta, smoothing, option):
    gap = 1.0 - beta * (chosen - rejected)
    slope = tl.where(gap > 0.0, -beta, 0.0)
    return tl.where(gap <= 0.0, 0.0, gap), slope, -slope  # tl.maximum would hide a NaN


@triton.jit
def _ipo_formula(chosen, rejected, chosen_length, rejected_length, beta, smoothing, option):
    distance = chosen / chosen_length - rejected / rejected_length - 0.5 / beta
    return distance * distance, 2.0 * distance / chosen_length, -2.0 * distance / rejected_length


@triton.jit
def _robust_formula(chosen, rejected, chosen_length, rejected_length, beta, smoothing, option):
    margin = beta * (chosen - rejected)
    own = (1.0 - smoothing) / (1.0 - 2.0 * smoothing)
    other = smoothing / (1.0 - 2.0 * smoothing)
    loss = own * softplus(-margin) - other * softplus(margin)
    slope = -beta * (own * _sigmoid(-margin) + other * _sigmoid(margin))
    return loss, slope, -slope


@triton.jit
def _exo_pair_formula(chosen, rejected, chosen_length, rejected_length, beta, smoothing, option):
    margin = beta * (chosen - rejected)
    is_right, is_swapped = _sigmoid(margin), _sigmoid(-margin)
    right, swapped = log1p(-smoothing), tl.log(smoothing)
    loss = is_right * (-softplus(-margin) - right) + is_swapped * (-softplus(margin) - swapped)
    slope = beta * is_right * is_swapped * (margin - (right - swapped))
    return loss, slope, -slope


@triton.jit
def _apo_zero_formula(chosen, rejected, chosen_length, rejected_length, beta, smoothing, option):
    loss = _sigmoid(-beta * chosen) + _sigmoid(beta * rejected)
    return loss, -beta * _bell(beta * chosen), beta * _bell(beta * rejected)


@triton.jit
def _apo_down_formula(chosen, rejected, chosen_length, rejected_length, beta, smoothing, option):
    margin = beta * (chosen - rejected)
    loss = _sigmoid(beta * chosen) + _sigmoid(-margin)
    return loss, beta * (_bell(beta * chosen) - _bell(margin)), beta * _bell(margin)


@triton.jit
def _nca_pair_formula(chosen, rejected, chosen_length, rejected_length, beta, smoothing, option):
    x, y = beta * chosen, beta * rejected
    loss = softplus(-x) + 0.5 * (softplus(x) + softplus(y))
    return loss, beta * (0.5 * _sigmoid(x) - _sigmoid(-x)), 0.5 * beta * _sigmoid(y)


@triton.jit
def _bco_pair_formula(chosen, rejected, chosen_length, rejected_length, beta, smoothing, option):
    x, y = beta * chosen, beta * rejected
    return softplus(-x) + softplus(y), -beta * _sigmoid(-x), beta * _sigmoid(y)


@triton.jit
def _sppo_hard_formula(chosen, rejected, chosen_length, rejected_length, beta, smoothing, option):
    d_chosen, d_rejected = chosen - 0.5 / beta, rejected + 0.5 / beta
    return d_chosen * d_chosen + d_rejected * d_rejected, 2.0 * d_chosen, 2.0 * d_rejected


@triton.jit
def _discopop_formula(chosen, rejected, chosen_length, rejected_length, beta, smoothing, option):
    margin = beta * (chosen - rejected)
    blend, rest = _sigmoid(margin / option), _sigmoid(-margin / option)
    logistic = softplus(-margin)
    exponential = tl.exp(-softplus(-margin / option) - margin)  # times blend
    slope = exponential * (rest / option - 1.0)
    slope -= rest * (_sigmoid(-margin) + logistic * blend / option)
    return logistic * rest + exponential, beta * slope, -beta * slope


@triton.jit
def _dpop_formula(chosen, rejected, chosen_length, rejected_length, beta, smoothing, option):
    weight = tl.where(chosen < 0.0, option, 0.0)
    margin = beta * (chosen - rejected + weight * chosen)
    slope = -beta * _sigmoid(-margin)
    return softplus(-margin), slope * (1.0 + weight), -slope


# Formulas by the name of their loss. A test compares the keys with those of the registry.
FORMULAS: dict[str, Any] = {
    "sigmoid": _sigmoid_formula,
    "sigmoid_norm": _sigmoid_norm_formula,
    "hinge": _hinge_formula,
    "ipo": _ipo_formula,
    "robust": _robust_formula,
    "exo_pair": _exo_pair_formula,
    "apo_zero": _apo_zero_formula,
    "apo_down": _apo_down_formula,
    "nca_pair": _nca_pair_formula,
    "bco_pair": _bco_pair_formula,
    "sppo_hard": _sppo_hard_formula,
    "discopop": _discopop_formula,
    "dpop": _dpop_formula,
}
