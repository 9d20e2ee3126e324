"""Gradients times a factor that is nearly always 1, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from dpofast_kernels.head.launch import takes_triton


def rescale(
    gradient: Tensor,
    factor: Tensor,  # []
    backend: str = "auto",
) -> Tensor:
    """Multiply by a factor in place, which costs no pass over memory if the factor is exactly 1.

    The host doesn't wait for a device to learn the factor.

    Args:
        gradient: any shape and floating dtype.
        factor: [] in any floating dtype, on the device of `gradient`. It is rounded to fp32 (fp64
            for an fp64 gradient) first.
        backend: of the head; "torch" does without Triton.

    Returns:
        `gradient`.
    """
    factor = factor.to(torch.promote_types(gradient.dtype, torch.float32))
    if gradient.is_contiguous() and takes_triton(gradient, backend):
        from dpofast_kernels.head.rescale_triton import rescale_fwd

        return rescale_fwd(gradient, factor)
    if gradient.device.type == "cpu":
        return gradient if factor.item() == 1.0 else gradient.mul_(factor)
    # On a GPU, `mul_` would round the factor to the gradient's dtype.
    return torch.mul(gradient.to(factor.dtype), factor, out=gradient)
