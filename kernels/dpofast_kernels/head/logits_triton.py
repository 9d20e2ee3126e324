"""Functions on logits, shared by the head's Triton kernels."""

# jit functions can't have types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from dpofast_kernels.head.options import HeadOptions
from dpofast_kernels.preference.formulas_triton import softplus


def logit_constants(options: HeadOptions) -> dict[str, Any]:
    """Constexprs of `finish_logits`, because Triton would round float arguments to fp32."""
    return {
        "HAS_BIAS": options.bias is not None,
        "SCALE": options.logit_scale,
        "SOFTCAP": options.softcap,
        "TEMPERATURE": options.temperature,
    }


@triton.jit
def _tanh(x):
    """tanh(x), written out because the interpreter has no libdevice.

    Its absolute error is one rounding of 1.0, so about 1e-7 of the cap. The matrix product's own
    rounding is no smaller.
    """
    e = tl.exp(-2.0 * tl.abs(x))
    magnitude = (1.0 - e) / (1.0 + e)
    return tl.where(x >= 0.0, magnitude, -magnitude)


@triton.jit
def finish_logits(
    b_z,  # products of hidden states and weight
    p_bias,  # [V]
    o_v,  # index in the vocabulary of each element of b_z; broadcasts to its shape
    m_v,  # mask of o_v, or None
    HAS_BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
):
    """Finished logits (see `HeadOptions`), and their derivative with respect to the product."""
    b_slope = tl.full(b_z.shape, SCALE / TEMPERATURE, dtype=b_z.dtype)
    if HAS_BIAS:
        b_z += tl.load(p_bias + o_v, mask=m_v)
    if SOFTCAP is None:
        b_z = b_z * (SCALE / TEMPERATURE)
    else:
        b_tanh = _tanh(b_z * (SCALE / SOFTCAP))
        b_z = b_tanh * (SOFTCAP / TEMPERATURE)
        b_slope = b_slope * (1.0 - b_tanh * b_tanh)
    return b_z, b_slope


@triton.jit
def label_logp(
    target,  # the label's logit z_label
    reference,  # k, subtracted from logits before exp; nothing to do with the reference policy
    rest,  # R, the sum of exp(z - k) over all tokens except the label
):
    """log p and -1 / S in fp64, with S = R + exp(z_label - k).

    log p = -softplus(log R + k - z_label) keeps its digits when p is close to 1.
    """
    gap = reference.to(tl.float64) - target.to(tl.float64)
    rest = rest.to(tl.float64)
    return -softplus(tl.log(rest) + gap), -1.0 / (rest + tl.exp(-gap))


@triton.jit
def row_logsumexp(target, reference, rest):
    """k + log S in fp64, the log-sum-exp; arguments as in `label_logp`.

    It is finite even if the label's own logit is -inf.
    """
    gap = reference.to(tl.float64) - target.to(tl.float64)
    return reference.to(tl.float64) + tl.log(rest.to(tl.float64) + tl.exp(-gap))
