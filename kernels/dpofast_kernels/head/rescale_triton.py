"""The Triton kernel of `rescale`."""

# jit functions can't be typed, and torch.cuda.device_of has no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

RESCALE_OPTIONS = {"B": 4096, "num_warps": 8}
# Enough programs for every GPU. Most calls have nothing to do, and then each further one costs.
MOST_PROGRAMS = 1024


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["p_factor"])
def rescale_kernel(
    p_gradient,  # [n]
    p_factor,  # []
    n,
    B: tl.constexpr,
):
    """gradient *= factor, by programs that end at once if the factor is 1.

    The last block is masked; all others are read in wide words.
    """
    factor = tl.load(p_factor)
    if factor != 1.0:
        for i_b in range(tl.program_id(0), tl.cdiv(n, B), tl.num_programs(0)):
            start = tl.cast(i_b, tl.int64) * B
            p_block, o_b = p_gradient + start, tl.arange(0, B)
            if start + B <= n:
                b_scaled = tl.load(p_block + o_b).to(factor.dtype) * factor
                tl.store(p_block + o_b, b_scaled.to(p_gradient.dtype.element_ty))
            else:
                m_b = start + o_b < n
                b_scaled = tl.load(p_block + o_b, mask=m_b).to(factor.dtype) * factor
                tl.store(p_block + o_b, b_scaled.to(p_gradient.dtype.element_ty), mask=m_b)


def rescale_fwd(
    gradient: Tensor,
    factor: Tensor,  # []
) -> Tensor:
    """`rescale` of a contiguous tensor."""
    grid = (min(triton.cdiv(gradient.numel(), RESCALE_OPTIONS["B"]), MOST_PROGRAMS),)
    if gradient.numel():
        with torch.cuda.device_of(gradient):
            rescale_kernel[grid](gradient, factor, gradient.numel(), **RESCALE_OPTIONS)
    return gradient
