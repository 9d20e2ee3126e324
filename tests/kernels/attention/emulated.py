"""The GPU's flash attention for variable lengths, emulated on the CPU.

The packages and PyTorch's operator agree on the meaning: queries are the last of their segment's
keys, and look at `left` keys before their own and at `right` keys after it; -1 is all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

Limits = tuple[int, int]


def heads_first(states: Tensor, repeats: int = 1) -> Tensor:
    return states.transpose(0, 1).repeat_interleave(repeats, 0)  # [n, H, D] -> [H repeats, n, D]


def segments(cu_q: Tensor, cu_k: Tensor) -> Iterator[tuple[slice, slice]]:
    assert cu_q.dtype == cu_k.dtype == torch.int32
    limits = zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True)
    return ((slice(*queries), slice(*keys)) for queries, keys in limits)


def masked(scores: Tensor, window: Limits) -> Tensor:
    """Scores [H, n, m], -inf where a query doesn't look."""
    num_queries, num_keys = scores.shape[1:]
    left, right = window
    offset = torch.arange(num_keys) - torch.arange(num_keys - num_queries, num_keys)[:, None]
    hidden = torch.zeros(num_queries, num_keys, dtype=torch.bool)
    if left >= 0:
        hidden |= offset < -left
    if right >= 0:
        hidden |= offset > right
    return scores.masked_fill(hidden, float("-inf"))


def check_heads(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Check what the kernels require, and return how many query heads share a key head."""
    assert query.shape[2] == key.shape[2] == value.shape[2]
    assert query.shape[2] % 8 == 0
    assert query.shape[2] <= 256
    assert key.shape[:2] == value.shape[:2]
    assert all(states.stride(-1) == 1 for states in (query, key, value))
    return query.shape[1] // key.shape[1]


def package_function(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    softmax_scale: float,
    causal: bool,
    window_size: Limits,
    deterministic: bool,
    softcap: float = 0.0,
) -> Tensor:
    """flash_attn_varlen_func of both packages, differentiable by autograd."""
    assert causal
    assert max_q == int(cu_q.diff().max())
    assert max_k == int(cu_k.diff().max())
    assert not deterministic
    repeats = check_heads(query, key, value)
    outputs = []
    for queries, keys in segments(cu_q, cu_k):
        scores = heads_first(query[queries]) @ heads_first(key[keys], repeats).transpose(1, 2)
        scores = scores * softmax_scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        probs = masked(scores, (window_size[0], 0)).softmax(-1)
        outputs.append((probs @ heads_first(value[keys], repeats)).transpose(0, 1))
    return torch.cat(outputs)


def _probs(query: Tensor, key: Tensor, scale: float, window: Limits) -> Tensor:
    return masked(query @ key.transpose(1, 2) * scale, window).softmax(-1)


def _window(is_causal: bool, options: dict[str, Any]) -> Limits:
    left, right = options["window_size_left"], options["window_size_right"]
    return left, 0 if is_causal else right


def operator_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    dropout: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """aten::_flash_attention_forward"""
    assert dropout == 0.0
    assert max_q == int(cu_q.diff().max())
    assert max_k == int(cu_k.diff().max())
    repeats = check_heads(query, key, value)
    out = torch.zeros_like(query)
    for queries, keys in segments(cu_q, cu_k):
        segment_key = heads_first(key[keys], repeats)
        probs = _probs(heads_first(query[queries]), segment_key, scale, _window(is_causal, options))
        out[queries] = (probs @ heads_first(value[keys], repeats)).transpose(0, 1)
    state = torch.zeros(2, dtype=torch.uint64)
    # The backward below computes the scores again, so it needs no log-sum-exp.
    return out, query.new_zeros(query.shape[1], len(query)), state, state.clone(), torch.zeros(0)


def operator_backward(
    d_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    dropout: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """aten::_flash_attention_backward"""
    repeats = check_heads(query, key, value)
    d_query, d_key, d_value = (torch.zeros_like(states) for states in (query, key, value))

    def shared(gradient: Tensor) -> Tensor:  # [Hq, m, D] -> [m, Hkv, D]
        return gradient.unflatten(0, (-1, repeats)).sum(1).transpose(0, 1)

    for queries, keys in segments(cu_q, cu_k):
        segment_query, segment_grad = heads_first(query[queries]), heads_first(d_output[queries])
        segment_key = heads_first(key[keys], repeats)
        segment_value = heads_first(value[keys], repeats)
        probs = _probs(segment_query, segment_key, scale, _window(is_causal, options))
        d_probs = segment_grad @ segment_value.transpose(1, 2)
        delta = (segment_grad * heads_first(out[queries])).sum(-1, keepdim=True)
        d_scores = probs * (d_probs - delta) * scale
        d_query[queries] = (d_scores @ segment_key).transpose(0, 1)
        d_key[keys] = shared(d_scores.transpose(1, 2) @ segment_query)
        d_value[keys] = shared(probs.transpose(1, 2) @ segment_grad)
    return d_query, d_key, d_value
