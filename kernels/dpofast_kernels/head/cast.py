"""Gradients times a factor, in the dtype of their inputs: one pass over memory, one rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from dpofast_kernels.head.launch import takes_triton


def scale_and_cast(
    source: Tensor, factor: Tensor | float, out: Tensor, backend: str = "auto"
) -> Tensor:
    """out = source * factor, multiplied in `source`'s dtype and then rounded to that of `out`.

    `torch.mul` does the same. On a GPU it takes PyTorch's kernel for mixed dtypes, which spends 87
    instructions on an element. So fp32 there goes through a kernel of its own.

    Args:
        source: any shape; fp32 or fp64.
        factor: [] in any floating dtype, on the device of `source`, or a number.
        out: the shape of `source`, in any floating dtype; it may be `source` itself.
        backend: of the head; "torch" does without Triton.

    Returns:
        `out`.
    """
    has_gaps = not (source.is_contiguous() and out.is_contiguous())
    if source.dtype == torch.float32 and not has_gaps and takes_triton(source, backend):
        from dpofast_kernels.head.cast_triton import scale_cast_fwd

        return scale_cast_fwd(source, factor, out)
    return torch.mul(source, factor, out=out)
