"""The head's three matrix products, accumulated in fp32 (fp64 for fp64 inputs).

Some devices have no product of low-precision matrices with an fp32 result. There the matrices are
upcast. The weight is upcast one block at a time, because a whole copy would be large.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dpofast_kernels.head.dtypes import has_wide_products

VOCAB_BLOCK = 8192


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
    # `product_dtype` keeps d_logits in bf16 only where this product with an fp32 result exists.
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
    """out = d_logits^T @ hidden_states; both factors are in `product_dtype`.

    `out` is in fp32, or in a narrower dtype into which the product is rounded once.
    """
    if d_logits.dtype == out.dtype:
        torch.mm(d_logits.t(), hidden_states, out=out)
    elif d_logits.dtype.itemsize > out.dtype.itemsize:
        for block in vocab_blocks(out):
            out[block] = torch.mm(d_logits[:, block].t(), hidden_states)
    else:
        torch.mm(d_logits.t(), hidden_states, out_dtype=out.dtype, out=out)


def add_weight_grad(
    d_weight: Tensor,  # [V, H]
    d_logits: Tensor,  # [n, V]
    hidden_states: Tensor,  # [n, H]
) -> None:
    """d_weight += d_logits^T @ hidden_states; both factors are in `product_dtype`."""
    if d_logits.dtype == d_weight.dtype:
        d_weight.addmm_(d_logits.t(), hidden_states)
    else:
        torch.addmm(d_weight, d_logits.t(), hidden_states, out_dtype=d_weight.dtype, out=d_weight)


def vocab_blocks(weight: Tensor) -> Iterator[slice]:
    """Slices that cover the vocabulary, VOCAB_BLOCK tokens each."""
    for start in range(0, len(weight), VOCAB_BLOCK):
        yield slice(start, start + VOCAB_BLOCK)
