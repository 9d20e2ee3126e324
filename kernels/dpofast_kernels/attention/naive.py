"""Attention written plainly: all scores at once. Tests compare the other back ends with it."""

from __future__ import annotations

import torch
from torch import Tensor

from dpofast_kernels.attention.call import AttentionCall
from dpofast_kernels.attention.layout import SharedLayout


def attends(layout: SharedLayout, window: int | None = None, chunk: int | None = None) -> Tensor:
    """The attention mask: element [i, j] is True if token i looks at token j.

    A token looks at itself and at the tokens before it in its prefix and in its own tail. With a
    window it looks only at those less than `window` positions away, and with chunks only at those
    of its own chunk of the sequence.

    Returns:
        [T, T] bool, on the layout's device.
    """
    tokens = torch.arange(layout.num_tokens, device=layout.device)
    group, tail, position = layout.group_ids, layout.tail_ids, layout.position_ids
    same_group = group[:, None] == group
    same_sequence = (tail == 0) | (tail[:, None] == tail)
    mask = same_group & same_sequence & (tokens[:, None] >= tokens)
    if window is not None:
        mask &= position[:, None] - position < window
    if chunk is not None:
        mask &= position[:, None] // chunk == position // chunk
    return mask


def naive_attention(call: AttentionCall) -> Tensor:
    """[T, Hq, Dv]. It computes all scores [Hq, T, T] at once, in fp32 at least."""
    query, key, value, options = call.query, call.key, call.value, call.options
    dtype = torch.promote_types(query.dtype, torch.float32)
    num_heads, repeats = query.shape[1], query.shape[1] // key.shape[1]
    key, value = (states.to(dtype).repeat_interleave(repeats, 1) for states in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.to(dtype), key)
    scores = scores * call.scale
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores.masked_fill(~attends(call.layout, options.window, options.chunk), float("-inf"))
    if options.sinks is not None:
        sinks = options.sinks.to(dtype).view(num_heads, 1, 1).expand(-1, len(query), 1)
        scores = torch.cat([scores, sinks], -1)  # [Hq, T, T+1]
    probs = scores.softmax(-1)[..., : len(query)]  # a sink takes its share but gives no value
    return torch.einsum("hqk,khd->qhd", probs, value).to(query.dtype)
