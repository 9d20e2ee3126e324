"""What attends to what, said plainly; the other backends are held to it."""

from __future__ import annotations

import torch
from torch import Tensor

from dpofast_kernels.attention.layout import SharedLayout
from dpofast_kernels.attention.options import AttentionOptions


def attends(layout: SharedLayout, window: int | None = None) -> Tensor:
    """Which token (first axis) looks at which (second axis).

    A token sees those before it in its prefix and in its own tail, and itself; of these, where
    there is a window, the ones less than `window` positions away.

    Returns:
        [T, T] bool, on the layout's device.
    """
    rows = torch.arange(layout.num_tokens, device=layout.device)
    group, tail, position = layout.group_ids, layout.tail_ids, layout.position_ids
    same_group = group[:, None] == group
    same_sequence = (tail == 0) | (tail[:, None] == tail)
    mask = same_group & same_sequence & (rows[:, None] >= rows)
    if window is not None:
        mask &= position[:, None] - position < window
    return mask


def naive_attention(
    query: Tensor,  # [T, Hq, D]
    key: Tensor,  # [T, Hkv, D]
    value: Tensor,  # [T, Hkv, Dv]
    layout: SharedLayout,
    options: AttentionOptions,
) -> Tensor:
    """[T, Hq, Dv] by way of all scores [Hq, T, T], in fp32 at least."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    num_heads, repeats = query.shape[1], query.shape[1] // key.shape[1]
    key, value = (states.to(dtype).repeat_interleave(repeats, 1) for states in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.to(dtype), key)
    scores = scores * options.scale_for(query.shape[-1])
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores.masked_fill(~attends(layout, options.window), float("-inf"))
    if options.sinks is not None:
        sinks = options.sinks.to(dtype).view(num_heads, 1, 1).expand(-1, len(query), 1)
        scores = torch.cat([scores, sinks], -1)  # [Hq, T, T+1]
    probs = scores.softmax(-1)[..., : len(query)]
    return torch.einsum("hqk,khd->qhd", probs, value).to(query.dtype)
