"""Attention on all segments at once: flash attention for variable lengths, on CUDA."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from dpofast_kernels.attention.call import AttentionCall
from dpofast_kernels.attention.gather import gather_keys
from dpofast_kernels.attention.options import AttentionOptions

MAX_HEAD_DIM = 256
_HEAD_DIM_MULTIPLE = 8
# PyTorch 2.11 takes fewer key heads than query heads without being told. Later versions need the
# flag.
_WANTS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters


def varlen_attention(call: AttentionCall) -> Tensor:
    """[T, Hq, Dv] by the flash attention that is built into PyTorch."""
    return _attend(varlen_on_gathered, call)


def flash3_attention(call: AttentionCall) -> Tensor:
    """[T, Hq, Dv] by FlashAttention-3, the package flash_attn_interface."""
    return _attend(_flash3, call)


def flash_attn_attention(call: AttentionCall) -> Tensor:
    """[T, Hq, Dv] by FlashAttention-2, the package flash_attn, which has softcaps."""
    return _attend(_flash_attn, call)


def padded_head_dim(head_dim: int, value_dim: int) -> int:
    """The one head size that queries, keys and values are padded to for the kernels."""
    return -(-max(head_dim, value_dim) // _HEAD_DIM_MULTIPLE) * _HEAD_DIM_MULTIPLE


def _attend(kernel: Callable[[AttentionCall], Tensor], call: AttentionCall) -> Tensor:
    """Pad the heads, gather keys and values, run a kernel on them, and cut the padding off."""
    value_dim = call.value.shape[-1]
    padded_dim = padded_head_dim(call.query.shape[-1], value_dim)
    # Padding with zeros changes neither scores nor outputs. But the default scale depends on the
    # head size, so the scale of the unpadded heads is set below.
    query, key, value = (_pad(states, padded_dim) for states in (call.query, call.key, call.value))
    gathered = AttentionCall(
        query,
        gather_keys(key, call.layout),
        gather_keys(value, call.layout),
        call.layout,
        replace(call.options, scale=call.scale),
    )
    return kernel(gathered)[..., :value_dim]


def _pad(states: Tensor, padded_dim: int) -> Tensor:
    missing = padded_dim - states.shape[-1]
    return F.pad(states, (0, missing)) if missing else states.contiguous()


def _keys_before(options: AttentionOptions) -> int:
    """The window as flash attention counts it: without the query itself; -1 is no window."""
    return -1 if options.window is None else options.window - 1


def varlen_on_gathered(call: AttentionCall) -> Tensor:
    """[T, Hq, D] from gathered keys and values, with D a multiple of 8 and the scale set."""
    gqa: dict[str, Any] = {"enable_gqa": True} if _WANTS_GQA and call.is_grouped else {}
    out = varlen_attn(
        call.query,
        call.key,
        call.value,
        call.layout.cu_seqlens_q,
        call.layout.cu_seqlens_k,
        call.layout.max_query_length,
        call.layout.max_key_length,
        scale=call.options.scale,
        # The 0 makes attention causal: no keys to the right, with the last query at the last key.
        # The window must be a tuple, because torch compares it with one.
        window_size=(_keys_before(call.options), 0),
        **gqa,
    )
    assert isinstance(out, Tensor)  # varlen_attn returns more only if asked to
    return out


def _flash3(call: AttentionCall) -> Tensor:
    out = importlib.import_module("flash_attn_interface").flash_attn_varlen_func(
        call.query,
        call.key,
        call.value,
        call.layout.cu_seqlens_q,
        call.layout.cu_seqlens_k,
        call.layout.max_query_length,
        call.layout.max_key_length,
        softmax_scale=call.options.scale,
        causal=True,
        window_size=(_keys_before(call.options), -1 if call.options.window is None else 0),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    # Some releases return the log-sum-exp, too.
    first: Tensor = out[0] if isinstance(out, tuple) else out
    return first


def _flash_attn(call: AttentionCall) -> Tensor:
    options = call.options
    out: Tensor = importlib.import_module("flash_attn").flash_attn_varlen_func(
        call.query,
        call.key,
        call.value,
        call.layout.cu_seqlens_q,
        call.layout.cu_seqlens_k,
        call.layout.max_query_length,
        call.layout.max_key_length,
        softmax_scale=options.scale,
        causal=True,
        window_size=(_keys_before(options), -1 if options.window is None else 0),
        softcap=0.0 if options.softcap is None else options.softcap,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return out
