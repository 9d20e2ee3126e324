"""Attention of a packed row on a CPU, without masks and without copies of keys.

A further tail sees all of its prefix and the beginning of itself. So its attention is one over the
prefix, which needs no mask, and a causal one over itself, and the two are merged by the logarithms
of their softmaxes' denominators, as FlashAttention (https://arxiv.org/abs/2205.14135) merges blocks
of keys. Its backward needs the merged output and denominator alone, whatever part the keys are of.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpofast_kernels.attention.layout import SharedLayout
from dpofast_kernels.attention.options import AttentionOptions

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def can_merge(query: Tensor, value: Tensor, options: AttentionOptions) -> bool:
    """Whether `merged_attention` runs for such a query [T, Hq, D] and value [T, Hkv, Dv]."""
    return (
        query.device.type == "cpu"
        and query.shape[-1] == value.shape[-1]
        and options.window is None  # of a prefix the window is no rectangle
    )


def merged_attention(
    query: Tensor,  # [T, Hq, D]
    key: Tensor,  # [T, Hkv, D]
    value: Tensor,  # [T, Hkv, D]
    layout: SharedLayout,
    options: AttentionOptions,
) -> Tensor:
    """[T, Hq, D]; `options` without a window, softcap or sinks."""
    scale = options.scale_for(query.shape[-1])
    out: Tensor = _Merged.apply(query, key, value, layout, scale)  # type: ignore[no-untyped-call]
    return out


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: SharedLayout, scale: float
    ) -> Tensor:
        out = query.new_empty(query.shape)
        lse_dtype = torch.promote_types(query.dtype, torch.float32)
        lse = query.new_empty(query.shape[1], len(query), dtype=lse_dtype)  # [Hq, T]
        for rows, prefix in _segments(layout):
            own, own_lse = _attend(query[rows], key[rows], value[rows], scale, is_causal=True)
            if prefix is not None:
                seen, seen_lse = _attend(query[rows], key[prefix], value[prefix], scale)
                total = torch.logaddexp(own_lse, seen_lse)  # [1, Hq, n]
                own = own * (own_lse - total).exp_()[..., None]
                own += seen * (seen_lse - total).exp_()[..., None]
                own_lse = total
            out[rows] = own[0].transpose(0, 1)
            lse[:, rows] = own_lse[0]
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        d_query, d_key, d_value = map(torch.empty_like, (query, key, value))
        for rows, prefix in _segments(ctx.layout):
            of_queries = d_out[rows], query[rows], out[rows], lse[:, rows]
            own = _gradients(*of_queries, key[rows], value[rows], ctx.scale, is_causal=True)
            d_query[rows], d_key[rows], d_value[rows] = own
            if prefix is not None:  # whose own gradients stand by now
                seen = _gradients(*of_queries, key[prefix], value[prefix], ctx.scale)
                d_query[rows] += seen[0]
                d_key[prefix] += seen[1]
                d_value[prefix] += seen[2]
        return d_query, d_key, d_value, None, None


def _segments(layout: SharedLayout) -> Iterator[tuple[slice, slice | None]]:
    """The rows of each segment, and those of the prefix that it goes on from, unless it has it."""
    start = group = 0
    for num_queries, num_keys in zip(layout.query_lengths, layout.key_lengths, strict=True):
        shared = num_keys - num_queries
        if not shared:
            group = start
        yield slice(start, start + num_queries), slice(group, group + shared) if shared else None
        start += num_queries


def _attend(
    query: Tensor,  # [n, Hq, D]
    key: Tensor,  # [m, Hkv, D]
    value: Tensor,  # [m, Hkv, D]
    scale: float,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Outputs [1, Hq, n, D], and the logarithms of the softmaxes' denominators [1, Hq, n]."""
    out, lse = _FORWARD(*map(_heads_first, (query, key, value)), 0.0, is_causal, scale=scale)
    return out, lse


def _gradients(
    d_out: Tensor,  # [n, Hq, D]
    query: Tensor,  # [n, Hq, D]
    out: Tensor,  # [n, Hq, D]
    lse: Tensor,  # [Hq, n]
    key: Tensor,  # [m, Hkv, D]
    value: Tensor,  # [m, Hkv, D]
    scale: float,
    is_causal: bool = False,
) -> list[Tensor]:
    """Those of queries, keys and values, shaped as these, as far as they come of these keys."""
    d_out, query, key, value, out = map(_heads_first, (d_out, query, key, value, out))
    gradients = _BACKWARD(d_out, query, key, value, out, lse[None], 0.0, is_causal, scale=scale)
    return [gradient[0].transpose(0, 1) for gradient in gradients]


def _heads_first(states: Tensor) -> Tensor:
    """[n, H, D] -> [1, H, n, D]"""
    return states.transpose(0, 1)[None]
