"""Attention segment by segment, on any device: PyTorch's own, or a plain softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dpofast_kernels.attention.gather import gather_keys
from dpofast_kernels.attention.layout import SharedLayout
from dpofast_kernels.attention.merged import can_merge, merged_attention
from dpofast_kernels.attention.options import AttentionOptions

_Attend = Callable[[Tensor, Tensor, Tensor, AttentionOptions], Tensor]


def sdpa_attention(
    query: Tensor,  # [T, Hq, D]
    key: Tensor,  # [T, Hkv, D]
    value: Tensor,  # [T, Hkv, Dv]
    layout: SharedLayout,
    options: AttentionOptions,
) -> Tensor:
    """[T, Hq, Dv] by scaled_dot_product_attention, which knows no softcap and no sinks."""
    if can_merge(query, value, options):
        return merged_attention(query, key, value, layout, options)
    return _by_segments(_sdpa, query, key, value, layout, options)


def plain_attention(
    query: Tensor,  # [T, Hq, D]
    key: Tensor,  # [T, Hkv, D]
    value: Tensor,  # [T, Hkv, Dv]
    layout: SharedLayout,
    options: AttentionOptions,
) -> Tensor:
    """[T, Hq, Dv] by products and a softmax in fp32 at least, which know everything."""
    return _by_segments(_plain, query, key, value, layout, options)


def _by_segments(
    attend: _Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: SharedLayout,
    options: AttentionOptions,
) -> Tensor:
    # One split of each for all segments: a slice for each would make a gradient of T rows each.
    queries = _split(query, layout.query_lengths)
    keys = _split(gather_keys(key, layout), layout.key_lengths)
    values = _split(gather_keys(value, layout), layout.key_lengths)
    outputs = [
        attend(*segment, options)[0].transpose(0, 1)  # [n, Hq, Dv]
        for segment in zip(queries, keys, values, strict=True)
    ]
    return torch.cat(outputs)


def _split(
    states: Tensor,  # [T or G, H, D]
    lengths: Sequence[int],
) -> list[Tensor]:
    """Z of [1, H, length, D]"""
    return [part.transpose(0, 1)[None] for part in torch.split(states, list(lengths))]


def _sdpa(
    query: Tensor,  # [1, Hq, n, D]
    key: Tensor,  # [1, Hkv, m, D]
    value: Tensor,  # [1, Hkv, m, Dv]
    options: AttentionOptions,
) -> Tensor:
    """[1, Hq, n, Dv]"""
    num_queries, num_keys = query.shape[2], key.shape[2]
    is_square = num_queries == num_keys and (options.window is None or options.window >= num_keys)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        # is_causal aligns queries with the first keys, here they are the last
        None if is_square else _sees(num_queries, num_keys, options.window, query.device),
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
    sees = _sees(num_queries, num_keys, options.window, query.device)
    scores = scores.masked_fill(~sees, float("-inf"))
    if options.sinks is not None:
        sinks = options.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(1, -1, num_queries, 1)
        scores = torch.cat([scores, sinks], -1)  # [1, Hq, n, m+1]
    probs = scores.softmax(-1)[..., :num_keys].to(value.dtype)
    return probs @ value


def _sees(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """[n, m] bool; the queries are the last of the keys."""
    query = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key = torch.arange(num_keys, device=device)
    sees = key <= query
    return sees if window is None else sees & (query - key < window)
