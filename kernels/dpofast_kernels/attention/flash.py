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

from dpofast_kernels.attention.gather import gather_keys
from dpofast_kernels.attention.layout import SharedLayout
from dpofast_kernels.attention.options import AttentionOptions

MAX_HEAD_DIM = 256
_HEAD_DIM_MULTIPLE = 8
# PyTorch 2.11 takes fewer key heads as they are, later ones want to be told.
_WANTS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters

# Takes gathered keys and values, all heads of one size, and options whose scale is set.
_Kernel = Callable[[Tensor, Tensor, Tensor, SharedLayout, AttentionOptions], Tensor]


def varlen_attention(
    query: Tensor,  # [T, Hq, D]
    key: Tensor,  # [T, Hkv, D]
    value: Tensor,  # [T, Hkv, Dv]
    layout: SharedLayout,
    options: AttentionOptions,
) -> Tensor:
    """[T, Hq, Dv] by what PyTorch has built in."""
    return _attend(varlen_on_gathered, query, key, value, layout, options)


def flash3_attention(
    query: Tensor,  # [T, Hq, D]
    key: Tensor,  # [T, Hkv, D]
    value: Tensor,  # [T, Hkv, Dv]
    layout: SharedLayout,
    options: AttentionOptions,
) -> Tensor:
    """[T, Hq, Dv] by FlashAttention-3, the package flash_attn_interface."""
    return _attend(_flash3, query, key, value, layout, options)


def flash_attn_attention(
    query: Tensor,  # [T, Hq, D]
    key: Tensor,  # [T, Hkv, D]
    value: Tensor,  # [T, Hkv, Dv]
    layout: SharedLayout,
    options: AttentionOptions,
) -> Tensor:
    """[T, Hq, Dv] by FlashAttention-2, the package flash_attn, which knows softcaps."""
    return _attend(_flash_attn, query, key, value, layout, options)


def padded_head_dim(head_dim: int, value_dim: int) -> int:
    """The one size for queries, keys and values with which the kernels are called."""
    return -(-max(head_dim, value_dim) // _HEAD_DIM_MULTIPLE) * _HEAD_DIM_MULTIPLE


def _attend(
    kernel: _Kernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: SharedLayout,
    options: AttentionOptions,
) -> Tensor:
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    # Zeros change neither scores nor outputs. The scale remains that of the true size.
    padded_dim = padded_head_dim(head_dim, value_dim)
    query, key, value = (_pad(states, padded_dim) for states in (query, key, value))
    key, value = gather_keys(key, layout), gather_keys(value, layout)
    options = replace(options, scale=options.scale_for(head_dim))
    return kernel(query, key, value, layout, options)[..., :value_dim]


def _pad(states: Tensor, padded_dim: int) -> Tensor:
    missing = padded_dim - states.shape[-1]
    return F.pad(states, (0, missing)) if missing else states.contiguous()


def _keys_before(options: AttentionOptions) -> int:
    """How flash attention counts a window: without the query itself; -1 is no window."""
    return -1 if options.window is None else options.window - 1


def varlen_on_gathered(
    query: Tensor,  # [T, Hq, D]
    key: Tensor,  # [G, Hkv, D]
    value: Tensor,  # [G, Hkv, D]
    layout: SharedLayout,
    options: AttentionOptions,
) -> Tensor:
    """[T, Hq, D]; the keys are gathered already, D is a multiple of 8, and the scale is set."""
    gqa: dict[str, Any] = (
        {"enable_gqa": True} if _WANTS_GQA and query.shape[1] != key.shape[1] else {}
    )
    out = varlen_attn(
        query,
        key,
        value,
        layout.cu_seqlens_q,
        layout.cu_seqlens_k,
        layout.max_query_length,
        layout.max_key_length,
        scale=options.scale,
        # Nothing to the right makes it causal, the last query aligned with the last key. A tuple:
        # torch compares it with one.
        window_size=(_keys_before(options), 0),
        **gqa,
    )
    assert isinstance(out, Tensor)  # it gives more only when asked
    return out


def _flash3(
    query: Tensor, key: Tensor, value: Tensor, layout: SharedLayout, options: AttentionOptions
) -> Tensor:
    out = importlib.import_module("flash_attn_interface").flash_attn_varlen_func(
        query,
        key,
        value,
        layout.cu_seqlens_q,
        layout.cu_seqlens_k,
        layout.max_query_length,
        layout.max_key_length,
        softmax_scale=options.scale,
        causal=True,
        window_size=(_keys_before(options), -1 if options.window is None else 0),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    # Some of its releases give the log-sum-exp, too.
    first: Tensor = out[0] if isinstance(out, tuple) else out
    return first


def _flash_attn(
    query: Tensor, key: Tensor, value: Tensor, layout: SharedLayout, options: AttentionOptions
) -> Tensor:
    out: Tensor = importlib.import_module("flash_attn").flash_attn_varlen_func(
        query,
        key,
        value,
        layout.cu_seqlens_q,
        layout.cu_seqlens_k,
        layout.max_query_length,
        layout.max_key_length,
        softmax_scale=options.scale,
        causal=True,
        window_size=(_keys_before(options), -1 if options.window is None else 0),
        softcap=0.0 if options.softcap is None else options.softcap,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return out
