"""cuDNN's attention, switched off where its gradients are NaN.

In PyTorch 2.11 to 2.13 on Hopper, the backward gives NaN for some lengths with a mask, if all
scores of a query are very low (github.com/pytorch/pytorch/issues/196678). Padded contenders can
meet that. Users are advised to switch cuDNN's attention off, too.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

LENGTH, HEAD_DIM = 64, 64  # wrong for all lengths with a remainder of 64 modulo 128
LOW_SCORE = -120.0  # wrong below -88.7, where fp32's exponential of its negative overflows


def right_attention(name: str, device: str) -> str:
    """Switch cuDNN's attention off for this process if its gradients are NaN.

    Args:
        name: transformers' name of the attention that a contender uses.
        device: "cpu" or "cuda".

    Returns:
        The name for the result, which says whether cuDNN is switched off.
    """
    if name != "sdpa" or device != "cuda" or not has_nan_gradients(device):
        return name
    torch.backends.cuda.enable_cudnn_sdp(False)
    return f"{name}, cuDNN switched off: NaN gradients (pytorch#196678)"


def has_nan_gradients(device: str, backend: SDPBackend = SDPBackend.CUDNN_ATTENTION) -> bool:
    """Whether a backend's gradients are NaN in the case that is known to go wrong."""
    shape = (1, 1, LENGTH, HEAD_DIM)
    generator = torch.Generator(device).manual_seed(0)
    query, key, value = (
        torch.randn(shape, generator=generator, device=device).mul_(0.1).bfloat16()
        for _ in range(3)
    )
    query[..., 0], key[..., 0] = 1.0, LOW_SCORE * math.sqrt(HEAD_DIM)
    leaves = (query.requires_grad_(), key.requires_grad_(), value.requires_grad_())
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=device).tril()[None, None]
    try:
        with sdpa_kernel(backend):
            output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        gradients = torch.autograd.grad(output, leaves, torch.randn_like(output))
    except RuntimeError:  # this PyTorch has no such kernel for this device, so nothing uses it
        return False
    return not all(bool(gradient.isfinite().all()) for gradient in gradients)
