"""The losses as jit functions. Each formula is that of the loss's class in this folder.

Each function of pairs takes the chosen and the rejected log-ratio, the chosen and the rejected
length, beta, label_smoothing and the loss's own two options (0 if it has none), all fp64 scalars.
It returns the loss, d loss / d chosen log-ratio and d loss / d rejected log-ratio.

Each function of single answers takes the log-ratio, z, whether the answer is desirable, beta and
the answer's weight, and returns the loss and d loss / d log-ratio.
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
def _sigmoid_formula(
    chosen, rejected, chosen_length, rejected_length, beta, smoothing, option, second
):
    loss, slope = _logistic(beta * (chosen - rejected), smoothing)
    return loss, beta * slope, -beta * slope


@triton.jit
def _sigmoid_norm_formula(
    chosen, rejected, chosen_length, rejected_length, beta, smoothing, option, second
):
    # Two quotients rather than four: each is a call in fp64, and registers around it would spill.
    chosen_weight, rejected_weight = beta / chosen_length, beta / rejected_length
    loss, slope = _logistic(chosen * chosen_weight - rejected * rejected_weight, smoothing)
    return loss, slope * chosen_weight, -slope * rejected_weight


@triton.jit
def _hinge_formula(
    chosen, rejected, chosen_length, rejected_length, beta, smoothing, option, second
):
    gap = 1.0 - beta * (chosen - rejected)
    slope = tl.where(gap > 0.0, -beta, 0.0)
    return tl.where(gap <= 0.0, 0.0, gap), slope, -slope  # tl.maximum would hide a NaN


@triton.jit
def _ipo_formula(chosen, rejected, chosen_length, rejected_length, beta, smoothing, option, second):
    distance = chosen / chosen_length - rejected / rejected_length - 0.5 / beta
    return distance * distance, 2.0 * distance / chosen_length, -2.0 * distance / rejected_length


@triton.jit
def _robust_formula(
    chosen, rejected, chosen_length, rejected_length, beta, smoothing, option, second
):
    margin = beta * (chosen - rejected)
    own = (1.0 - smoothing) / (1.0 - 2.0 * smoothing)
    other = smoothing / (1.0 - 2.0 * smoothing)
    loss = own * softplus(-margin) - other * softplus(margin)
    slope = -beta * (own * _sigmoid(-margin) + other * _sigmoid(margin))
    return loss, slope, -slope


@triton.jit
def _exo_pair_formula(
    chosen, rejected, chosen_length, rejected_length, beta, smoothing, option, second
):
    margin = beta * (chosen - rejected)
    is_right, is_swapped = _sigmoid(margin), _sigmoid(-margin)
    right, swapped = log1p(-smoothing), tl.log(smoothing)
    loss = is_right * (-softplus(-margin) - right) + is_swapped * (-softplus(margin) - swapped)
    slope = beta * is_right * is_swapped * (margin - (right - swapped))
    return loss, slope, -slope


@triton.jit
def _apo_zero_formula(
    chosen, rejected, chosen_length, rejected_length, beta, smoothing, option, second
):
    loss = _sigmoid(-beta * chosen) + _sigmoid(beta * rejected)
    return loss, -beta * _bell(beta * chosen), beta * _bell(beta * rejected)


@triton.jit
def _apo_down_formula(
    chosen, rejected, chosen_length, rejected_length, beta, smoothing, option, second
):
    margin = beta * (chosen - rejected)
    loss = _sigmoid(beta * chosen) + _sigmoid(-margin)
    return loss, beta * (_bell(beta * chosen) - _bell(margin)), beta * _bell(margin)


@triton.jit
def _nca_pair_formula(
    chosen, rejected, chosen_length, rejected_length, beta, smoothing, option, second
):
    x, y = beta * chosen, beta * rejected
    loss = softplus(-x) + 0.5 * (softplus(x) + softplus(y))
    return loss, beta * (0.5 * _sigmoid(x) - _sigmoid(-x)), 0.5 * beta * _sigmoid(y)


@triton.jit
def _bco_pair_formula(
    chosen, rejected, chosen_length, rejected_length, beta, smoothing, option, second
):
    x, y = beta * chosen, beta * rejected
    return softplus(-x) + softplus(y), -beta * _sigmoid(-x), beta * _sigmoid(y)


@triton.jit
def _sppo_hard_formula(
    chosen, rejected, chosen_length, rejected_length, beta, smoothing, option, second
):
    d_chosen, d_rejected = chosen - 0.5 / beta, rejected + 0.5 / beta
    return d_chosen * d_chosen + d_rejected * d_rejected, 2.0 * d_chosen, 2.0 * d_rejected


@triton.jit
def _discopop_formula(
    chosen, rejected, chosen_length, rejected_length, beta, smoothing, option, second
):
    margin = beta * (chosen - rejected)
    blend, rest = _sigmoid(margin / option), _sigmoid(-margin / option)
    logistic = softplus(-margin)
    exponential = tl.exp(-softplus(-margin / option) - margin)  # times blend
    slope = exponential * (rest / option - 1.0)
    slope -= rest * (_sigmoid(-margin) + logistic * blend / option)
    return logistic * rest + exponential, beta * slope, -beta * slope


@triton.jit
def _dpop_formula(
    chosen, rejected, chosen_length, rejected_length, beta, smoothing, option, second
):
    weight = tl.where(chosen < 0.0, option, 0.0)
    margin = beta * (chosen - rejected + weight * chosen)
    slope = -beta * _sigmoid(-margin)
    return softplus(-margin), slope * (1.0 + weight), -slope


@triton.jit
def _simpo_formula(
    chosen, rejected, chosen_length, rejected_length, beta, smoothing, option, second
):
    chosen_weight, rejected_weight = beta / chosen_length, beta / rejected_length
    margin = chosen * chosen_weight - rejected * rejected_weight - option
    loss, slope = _logistic(margin, smoothing)
    return loss, slope * chosen_weight, -slope * rejected_weight


@triton.jit
def _expm1(x):
    """exp(x) - 1, exact to rounding even if the result is close to 0."""
    e = tl.exp(x)
    # W. Kahan's expm1: the logarithm brings back the digits that exp(x) - 1 loses.
    is_plain = (e == 1.0) | (e - 1.0 == -1.0) | (tl.abs(x) > 1.0)
    near = (e - 1.0) * x / tl.where(is_plain, 1.0, tl.log(tl.where(is_plain, 2.0, e)))
    return tl.where(e == 1.0, x, tl.where(is_plain, e - 1.0, near))


@triton.jit
def _alpha_reward(mean_logp, alpha):
    """AlphaPO's reward of a mean log-prob, and its slope."""
    exponent = -alpha * mean_logp
    clamped = tl.minimum(exponent, 80.0)
    slope = tl.where(exponent <= 80.0, tl.exp(clamped), 0.0)
    divisor = tl.where(alpha == 0.0, 1.0, alpha)
    reward = tl.where(alpha == 0.0, mean_logp, -_expm1(clamped) / divisor)
    return reward, slope


@triton.jit
def _alphapo_formula(
    chosen, rejected, chosen_length, rejected_length, beta, smoothing, option, second
):
    chosen_reward, chosen_slope = _alpha_reward(chosen / chosen_length, second)
    rejected_reward, rejected_slope = _alpha_reward(rejected / rejected_length, second)
    loss, slope = _logistic(beta * (chosen_reward - rejected_reward) - option, smoothing)
    slope = beta * slope
    return loss, slope * chosen_slope / chosen_length, -slope * rejected_slope / rejected_length


@triton.jit
def _log1mexp(x):
    """log(1 - exp(x)) for x < 0, exact to rounding on both ends."""
    is_near = x > -0.6931471805599453
    near = tl.log(-_expm1(tl.where(is_near, x, -1.0)))
    return tl.where(is_near, near, log1p(-tl.exp(tl.where(is_near, -1.0, x))))


# 2**-40: as a literal, a number that isn't a power of 2 would be rounded to fp32.
SMALLEST_LOSS = tl.constexpr(2.0**-40)


@triton.jit
def _orpo_formula(
    chosen, rejected, chosen_length, rejected_length, beta, smoothing, option, second
):
    mean_chosen, mean_rejected = chosen / chosen_length, rejected / rejected_length
    x, y = tl.minimum(mean_chosen, -SMALLEST_LOSS), tl.minimum(mean_rejected, -SMALLEST_LOSS)
    not_x, not_y = _log1mexp(x), _log1mexp(y)
    log_odds_ratio = (x - not_x) - (y - not_y)
    slope = -softplus(log_odds_ratio)
    d_chosen = -beta * tl.exp(slope - not_x) / chosen_length
    d_rejected = beta * tl.exp(slope - not_y) / rejected_length
    d_chosen = tl.where(mean_chosen > -SMALLEST_LOSS, 0.0, d_chosen)
    d_rejected = tl.where(mean_rejected > -SMALLEST_LOSS, 0.0, d_rejected)
    return beta * softplus(-log_odds_ratio), d_chosen, d_rejected


@triton.jit
def _prospect(distance, is_desirable, beta, weight):
    x = beta * tl.where(is_desirable, distance, -distance)
    slope = beta * weight * _bell(x)
    return weight * _sigmoid(-x), tl.where(is_desirable, -slope, slope)


@triton.jit
def _kto_formula(logratio, z, is_desirable, beta, weight):
    return _prospect(logratio - z, is_desirable, beta, weight)


@triton.jit
def _apo_zero_unpaired_formula(logratio, z, is_desirable, beta, weight):
    return _prospect(logratio, is_desirable, beta, weight)


# Formulas by the name of their loss. Tests compare the keys with those of the registries.
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
    "cpo": _sigmoid_formula,
    "cpo_hinge": _hinge_formula,
    "cpo_ipo": _ipo_formula,
    "simpo": _simpo_formula,
    "alphapo": _alphapo_formula,
    "orpo": _orpo_formula,
}
UNPAIRED_FORMULAS: dict[str, Any] = {
    "kto": _kto_formula,
    "apo_zero_unpaired": _apo_zero_unpaired_formula,
}
