"""How exact matrix products are on a device."""

from __future__ import annotations

import torch

# Largest error, relative to the result's norm, at which a product counts as fp32 or as fp16. A
# product with 64 terms has an error of 1e-7 in fp32, 3e-4 in TF32 and 2e-3 in bf16.
_EXACT, _AS_FP16 = 1e-5, 1e-3


def product_precision(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype whose precision the matrix products of `dtype` really have on this device.

    Callers choose their tolerances by the result. Several settings of PyTorch and of the
    environment let fp32 products run in TF32, whose mantissa is as short as that of fp16, or in
    bf16. This function measures the combined effect of these settings instead of reading each of
    them.
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
