"""Attention of a packed row on a CPU, without masks and without copies of keys.

Every tail but the first looks at all of its prefix and, causally, at itself. So its attention is
computed in two parts: one over the prefix, which needs no mask, and a causal one over itself. The
parts are merged by their log-sum-exps, as FlashAttention (https://arxiv.org/abs/2205.14135) merges
blocks of keys. The backward of each part needs only the merged output and the merged log-sum-exp
from the forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpofast_kernels.attention.call import AttentionCall
from dpofast_kernels.attention.layout import SharedLayout

# On a CPU, F.scaled_dot_product_attention calls these operators and drops the log-sum-exp.
_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def can_merge(call: AttentionCall) -> bool:
    """Whether `merged_attention` can run this call, which has no softcap and no sinks."""
    return (
        call.query.device.type == "cpu"
        and call.query.shape[-1] == call.value.shape[-1]
        and call.options.window is None  # with a window, the part over the prefix needs a mask
    )


def merged_attention(call: AttentionCall) -> Tensor:
    """[T, Hq, D]; Dv equals D, and there is no window, no softcap and no sinks."""
    out: Tensor = _Merged.apply(  # type: ignore[no-untyped-call]
        call.query, call.key, call.value, call.layout, call.scale
    )
    return out


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: SharedLayout, scale: float
    ) -> Tensor:
        out = query.new_empty(query.shape)
        lse_dtype = torch.promote_types(query.dtype, torch.float32)
        lse = query.new_empty(query.shape[1], len(query), dtype=lse_dtype)  # [Hq, T]
        for tokens, prefix in _segments(layout):
            own, own_lse = _attend(query[tokens], key[tokens], value[tokens], scale, is_causal=True)
            if prefix is not None:
                seen, seen_lse = _attend(query[tokens], key[prefix], value[prefix], scale)
                # Each part is normalised by its own sum. Weight it by its share of the total.
                total = torch.logaddexp(own_lse, seen_lse)  # [1, Hq, n]
                own = own * (own_lse - total).exp_()[..., None]
                own += seen * (seen_lse - total).exp_()[..., None]
                own_lse = total
            out[tokens] = own[0].transpose(0, 1)
            lse[:, tokens] = own_lse[0]
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        d_query, d_key, d_value = map(torch.empty_like, (query, key, value))
        for tokens, prefix in _segments(ctx.layout):
            of_queries = d_out[tokens], query[tokens], out[tokens], lse[:, tokens]
            own = _gradients(*of_queries, key[tokens], value[tokens], ctx.scale, is_causal=True)
            d_query[tokens], d_key[tokens], d_value[tokens] = own
            if prefix is not None:
                # The prefix is part of an earlier segment, which has set its gradients already.
                seen = _gradients(*of_queries, key[prefix], value[prefix], ctx.scale)
                d_query[tokens] += seen[0]
                d_key[prefix] += seen[1]
                d_value[prefix] += seen[2]
        return d_query, d_key, d_value, None, None


def _segments(layout: SharedLayout) -> Iterator[tuple[slice, slice | None]]:
    """The tokens of each segment, and the prefix that it continues.

    The prefix is None for the first segment of a group, which contains it.
    """
    start = group_start = 0
    for num_queries, num_keys in zip(layout.query_lengths, layout.key_lengths, strict=True):
        num_shared = num_keys - num_queries
        if not num_shared:
            group_start = start
        prefix = slice(group_start, group_start + num_shared) if num_shared else None
        yield slice(start, start + num_queries), prefix
        start += num_queries


def _attend(
    query: Tensor,  # [n, Hq, D]
    key: Tensor,  # [m, Hkv, D]
    value: Tensor,  # [m, Hkv, D]
    scale: float,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Outputs [1, Hq, n, D] and log-sum-exps of the scores [1, Hq, n]."""
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
    """Gradients of queries, keys and values that come from these keys; shaped like the inputs."""
    d_out, query, key, value, out = map(_heads_first, (d_out, query, key, value, out))
    gradients = _BACKWARD(d_out, query, key, value, out, lse[None], 0.0, is_causal, scale=scale)
    return [gradient[0].transpose(0, 1) for gradient in gradients]


def _heads_first(states: Tensor) -> Tensor:
    """[n, H, D] -> [1, H, n, D]"""
    return states.transpose(0, 1)[None]
