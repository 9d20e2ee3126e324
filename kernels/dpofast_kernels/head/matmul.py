"""The head's three products, accumulated in fp32 (fp64 for fp64 inputs).

Where the device has no product of low-precision matrices with an fp32 result, they are upcast: the
weight block by block, so that no copy of its size is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

VOCAB_BLOCK = 8192


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and of gradients under way, for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which d_logits and scaled hidden states go into a product.

    fp16 is upcast: scaled by a pair's coefficient, hidden states fall below its range.
    """
    if weight.dtype == torch.bfloat16 and has_wide_products(weight.device, weight.dtype):
        return torch.bfloat16
    return accumulate_dtype(weight.dtype)


@lru_cache(maxsize=32)
def has_wide_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device multiplies matrices of that dtype with an fp32 result."""
    if device.type != "cuda":
        return False
    small = torch.zeros(16, 16, dtype=dtype, device=device)
    try:
        torch.mm(small, small, out_dtype=torch.float32)
    except RuntimeError:  # some builds for ROCm
        return False
    return True


def logits_into(
    out: Tensor,  # [n, V]
    hidden_states: Tensor,  # [n, H]
    weight: Tensor,  # [V, H]
) -> Tensor:
    """out = hidden_states @ weight^T; returns `out`."""
    if weight.dtype == out.dtype:
        return torch.mm(hidden_states, weight.t(), out=out)
    if has_wide_products(weight.device, weight.dtype):
        return torch.mm(hidden_states, weight.t(), out_dtype=out.dtype, out=out)
    upcast = hidden_states.to(out.dtype)
    for block in vocab_blocks(weight):
        torch.mm(upcast, weight[block].to(out.dtype).t(), out=out[:, block])
    return out


def hidden_grad_into(
    out: Tensor,  # [n, H]
    d_logits: Tensor,  # [n, V]
    weight: Tensor,  # [V, H]
) -> Tensor:
    """out = d_logits @ weight; returns `out`."""
    if weight.dtype == out.dtype:
        return torch.mm(d_logits, weight, out=out)
    if d_logits.dtype == weight.dtype:
        return torch.mm(d_logits, weight, out_dtype=out.dtype, out=out)
    out.zero_()
    for block in vocab_blocks(weight):
        out.addmm_(d_logits[:, block], weight[block].to(out.dtype))
    return out


def weight_grad_into(
    out: Tensor,  # [V, H]
    d_logits: Tensor,  # [n, V]
    hidden_states: Tensor,  # [n, H]
) -> None:
    """out = d_logits^T @ hidden_states, both of them in `product_dtype`."""
    if d_logits.dtype == out.dtype:
        torch.mm(d_logits.t(), hidden_states, out=out)
    else:
        torch.mm(d_logits.t(), hidden_states, out_dtype=out.dtype, out=out)


def add_weight_grad(
    d_weight: Tensor,  # [V, H]
    d_logits: Tensor,  # [n, V]
    hidden_states: Tensor,  # [n, H]
) -> None:
    """d_weight += d_logits^T @ hidden_states, both of them in `product_dtype`."""
    if d_logits.dtype == d_weight.dtype:
        d_weight.addmm_(d_logits.t(), hidden_states)
    else:
        torch.addmm(d_weight, d_logits.t(), hidden_states, out_dtype=d_weight.dtype, out=d_weight)


def vocab_blocks(weight: Tensor) -> Iterator[slice]:
    for start in range(0, len(weight), VOCAB_BLOCK):
        yield slice(start, start + VOCAB_BLOCK)
