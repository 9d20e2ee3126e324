"""Functions on logits, shared by the head's Triton kernels.

The kernels work with x, a logit up to a constant factor UNIT. Because exp(z - k) is computed as
exp2(x * (UNIT * LOG2E) - k2), the factor costs nothing: one fused multiply-add and one exp2.
"""

# jit functions can't have types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from dpofast_kernels.head.options import HeadOptions
from dpofast_kernels.preference.formulas_triton import softplus

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2.0))


def logit_constants(options: HeadOptions) -> dict[str, Any]:
    """What the kernels know about logits, as constexprs: Triton rounds float arguments to fp32.

    HAS_BIAS: whether a bias is added to the products.
    CAP: what products are multiplied by before tanh; None without a cap.
    UNIT: the finished logit is UNIT * x.
    SLOPE: derivative of the finished logit with respect to the product, without the factor that
        tanh adds.
    """
    softcap, temperature = options.softcap, options.temperature
    return {
        "HAS_BIAS": options.bias is not None,
        "CAP": None if softcap is None else options.logit_scale / softcap,
        "UNIT": (options.logit_scale if softcap is None else softcap) / temperature,
        "SLOPE": options.logit_scale / temperature,
    }


@triton.jit
def _tanh(x):
    """tanh(x), written out because the interpreter has no libdevice.

    Its absolute error is one rounding of 1.0, so about 1e-7 of the cap. The matrix product's own
    rounding is no smaller.
    """
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))


@triton.jit
def unscaled_logits(
    b_z,  # products of hidden states and weight
    p_bias,  # [V]
    o_v,  # index in the vocabulary of each element of b_z; broadcasts to its shape
    m_v,  # mask of o_v, or None
    HAS_BIAS: tl.constexpr,
    CAP: tl.constexpr,
):
    """x, and the derivative of tanh, which is 1 without a cap; see `logit_constants`."""
    b_slope = tl.full(b_z.shape, 1.0, dtype=b_z.dtype)
    if HAS_BIAS:
        b_z += tl.load(p_bias + o_v, mask=m_v)
    if CAP is not None:
        b_z = _tanh(b_z * CAP)
        b_slope = 1.0 - b_z * b_z
    return b_z, b_slope


@triton.jit
def exponents(
    b_x,
    b_k2,  # k * LOG2E, as `scaled` rounds it
    UNIT: tl.constexpr,
):
    """(z - k) * LOG2E, rounded once."""
    b_unit = tl.full(b_x.shape, UNIT * LOG2E, dtype=b_x.dtype)
    return tl.fma(b_x, b_unit, -b_k2)


@triton.jit
def scaled(
    x,
    UNIT: tl.constexpr,
):
    """z * LOG2E."""
    return x * (UNIT * LOG2E)


@triton.jit
def in_nats(
    x,
    UNIT: tl.constexpr,
):
    """z in fp64, without a rounding between it and `exponents`."""
    unit = tl.full([], UNIT * LOG2E, dtype=x.dtype)
    return x.to(tl.float64) * unit.to(tl.float64) * LN2


@triton.jit
def label_logp(
    target,  # the label's logit z_label, fp64
    reference,  # k, subtracted from logits before exp; nothing to do with the reference policy
    rest,  # R, the sum of exp(z - k) over all tokens except the label
):
    """log p and -1 / S in fp64, with S = R + exp(z_label - k).

    log p = -softplus(log R + k - z_label) keeps its digits when p is close to 1.
    """
    gap = reference - target
    return -softplus(tl.log(rest) + gap), -1.0 / (rest + tl.exp(-gap))


@triton.jit
def row_logsumexp(target, reference, rest):
    """k + log S in fp64, the log-sum-exp; arguments as in `label_logp`.

    It is finite even if the label's own logit is -inf.
    """
    return reference + tl.log(rest + tl.exp(target - reference))
