"""How exact a device's products of matrices are."""

from __future__ import annotations

import torch

# Of the norm of the result. One of 64 terms: fp32 gives 1e-7, TF32 3e-4, bf16 2e-3.
_EXACT, _AS_FP16 = 1e-5, 1e-3


def product_precision(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype whose mantissa products of matrices of `dtype` have; tolerances go by it.

    Settings of PyTorch, and of the environment, let fp32 be multiplied in TF32, whose mantissa is
    that of fp16, or in bf16. There are several of them, so what they give is measured.
    """
    if dtype != torch.float32:
        return dtype
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 64, 64, generator=generator)
    exact = left.double() @ right.double()
    got = torch.mm(left.to(device), right.to(device)).cpu()
    error = ((got - exact).norm() / exact.norm()).item()
    if error <= _EXACT:
        return torch.float32
    return torch.float16 if error <= _AS_FP16 else torch.bfloat16
