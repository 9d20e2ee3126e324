"""Attention segment by segment, on any device: PyTorch's own attention, or a plain softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dpofast_kernels.attention.call import AttentionCall
from dpofast_kernels.attention.gather import gather_keys
from dpofast_kernels.attention.merged import can_merge, merged_attention
from dpofast_kernels.attention.options import AttentionOptions

# Attention of one segment: query [1, Hq, n, D], key [1, Hkv, m, D], value [1, Hkv, m, Dv].
_Attend = Callable[[Tensor, Tensor, Tensor, AttentionOptions], Tensor]


def sdpa_attention(call: AttentionCall) -> Tensor:
    """[T, Hq, Dv] by scaled_dot_product_attention, which has no softcap and no sinks."""
    if can_merge(call):
        return merged_attention(call)
    return _by_segments(_sdpa, call)


def plain_attention(call: AttentionCall) -> Tensor:
    """[T, Hq, Dv] by matrix products and a softmax in fp32 at least, with every option."""
    return _by_segments(_plain, call)


def _by_segments(attend: _Attend, call: AttentionCall) -> Tensor:
    layout = call.layout
    # Split each tensor once. If every segment were a slice, its backward would allocate a gradient
    # of the whole row.
    queries = _split(call.query, layout.query_lengths)
    keys = _split(gather_keys(call.key, layout), layout.key_lengths)
    values = _split(gather_keys(call.value, layout), layout.key_lengths)
    outputs = [
        attend(*segment, call.options)[0].transpose(0, 1)  # [n, Hq, Dv]
        for segment in zip(queries, keys, values, strict=True)
    ]
    return torch.cat(outputs)


def _split(
    states: Tensor,  # [T or G, H, D]
    lengths: Sequence[int],
) -> list[Tensor]:
    """One [1, H, length, D] for each of the Z segments."""
    return [part.transpose(0, 1)[None] for part in torch.split(states, list(lengths))]


def _sdpa(
    query: Tensor,  # [1, Hq, n, D]
    key: Tensor,  # [1, Hkv, m, D]
    value: Tensor,  # [1, Hkv, m, Dv]
    options: AttentionOptions,
) -> Tensor:
    """[1, Hq, n, Dv]"""
    num_queries, num_keys = query.shape[2], key.shape[2]
    # is_causal aligns the queries with the first keys. Our queries belong to the last keys, which
    # are also the first ones only if there are as many queries as keys.
    is_square = num_queries == num_keys and (options.window is None or options.window >= num_keys)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        None if is_square else _visible(num_queries, num_keys, options.window, query.device),
        is_causal=is_square,
        scale=options.scale_for(query.shape[-1]),
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _plain(
    query: Tensor,  # [1, Hq, n, D]
    key: Tensor,  # [1, Hkv, m, D]
    value: Tensor,  # [1, Hkv, m, Dv]
    options: AttentionOptions,
) -> Tensor:
    """[1, Hq, n, Dv]"""
    num_queries, num_keys = query.shape[2], key.shape[2]
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(-1, -2) * options.scale_for(query.shape[-1])  # [1, Hq, n, m]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    visible = _visible(num_queries, num_keys, options.window, query.device)
    scores = scores.masked_fill(~visible, float("-inf"))
    if options.sinks is not None:
        sinks = options.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(1, -1, num_queries, 1)
        scores = torch.cat([scores, sinks], -1)  # [1, Hq, n, m+1]
    probs = scores.softmax(-1)[..., :num_keys].to(value.dtype)
    return probs @ value


def _visible(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """[n, m] bool, True where a query looks at a key; the queries are at the last n positions."""
    query = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key = torch.arange(num_keys, device=device)
    visible = key <= query
    return visible if window is None else visible & (query - key < window)
