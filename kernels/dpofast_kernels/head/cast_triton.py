"""The Triton kernel of `cast.scale_and_cast`."""

# jit functions can't be typed, and torch.cuda.device_of has no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Sixteen elements a thread: four wide loads are under way at once. The kernel is bound by memory on
# every GPU, so it has no entry in the launch table.
CAST_OPTIONS = {"B": 4096, "num_warps": 8}


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["p_factor"])
def scale_cast_kernel(
    p_source,  # [n]
    p_factor,  # []
    p_out,  # [n]
    n,
    B: tl.constexpr,
):
    """out = source * factor. The last block is masked; all others are read in wide words."""
    start = tl.program_id(0).to(tl.int64) * B
    factor = tl.load(p_factor).to(p_source.dtype.element_ty)
    p_source, p_out, o_b = p_source + start, p_out + start, tl.arange(0, B)
    if start + B <= n:
        b_scaled = tl.load(p_source + o_b) * factor
        tl.store(p_out + o_b, b_scaled.to(p_out.dtype.element_ty))
    else:
        m_b = start + o_b < n
        b_scaled = tl.load(p_source + o_b, mask=m_b) * factor
        tl.store(p_out + o_b, b_scaled.to(p_out.dtype.element_ty), mask=m_b)


def scale_cast_fwd(source: Tensor, factor: Tensor | float, out: Tensor) -> Tensor:
    """`cast.scale_and_cast` of contiguous tensors."""
    assert source.shape == out.shape
    assert source.is_contiguous()
    assert out.is_contiguous()
    if not isinstance(factor, Tensor):
        factor = source.new_full((), factor)
    grid = (triton.cdiv(source.numel(), CAST_OPTIONS["B"]),)
    if source.numel():
        with torch.cuda.device_of(source):
            scale_cast_kernel[grid](source, factor, out, source.numel(), **CAST_OPTIONS)
    return out
