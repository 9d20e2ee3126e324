"""Attention by FlexAttention, compiled: softcaps, sinks, fp32 and ROCm."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from dpofast_kernels.attention.layout import SharedLayout
from dpofast_kernels.attention.options import AttentionOptions

BLOCK_SIZE = 128
_MIN_HEAD_DIM = 16  # the least that its kernels multiply
# It compiles anew for each kind of options, with and without gradients, and up to three times for
# row lengths. PyTorch stops at 8 and would then make all T x T scores; here that is an error.
_MAX_VARIANTS = 64
_BLOCK_MASKS: WeakKeyDictionary[SharedLayout, dict[int | None, BlockMask]] = WeakKeyDictionary()


def flex_attention_on_row(
    query: Tensor,  # [T, Hq, D]
    key: Tensor,  # [T, Hkv, D]
    value: Tensor,  # [T, Hkv, Dv]
    layout: SharedLayout,
    options: AttentionOptions,
) -> Tensor:
    """[T, Hq, Dv]; nothing is gathered, the block mask says who sees whom.

    A sink takes the part e^sink / (e^sink + sum of e^score) of the softmax, so that what remains is
    the output without it, times sigmoid(lse - sink); lse is the scores' log-sum-exp.
    """
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    query, key, value = (_batched(states) for states in (query, key, value))
    with _more_variants():
        out, aux = _compiled()(
            query,
            key,
            value,
            score_mod=None if options.softcap is None else _capped(options.softcap),
            block_mask=block_mask(layout, options.window),
            scale=options.scale_for(head_dim),
            enable_gqa=query.shape[1] != key.shape[1],
            return_aux=AuxRequest(lse=True),
        )
    if options.sinks is not None:
        sinks = options.sinks.to(aux.lse.dtype).view(1, -1, 1)
        out = out * torch.sigmoid(aux.lse - sinks)[..., None].to(out.dtype)
    attended: Tensor = out[0, ..., :value_dim].transpose(0, 1)
    return attended


def block_mask(layout: SharedLayout, window: int | None) -> BlockMask:
    """What attends to what, in blocks; made once for a layout and a window."""
    masks = _BLOCK_MASKS.setdefault(layout, {})
    if window not in masks:
        masks[window] = _make_block_mask(layout, window)
    return masks[window]


def _make_block_mask(layout: SharedLayout, window: int | None) -> BlockMask:
    """As create_block_mask would, but from intervals, without a mask of T x T."""
    num_tokens = layout.num_tokens
    counts = _visible_in_blocks(layout, window)  # [T, blocks]
    padding = -num_tokens % BLOCK_SIZE
    by_block = F.pad(counts, (0, 0, 0, padding)).view(-1, BLOCK_SIZE, counts.shape[1])
    full = (by_block == BLOCK_SIZE).all(1)  # [blocks, blocks]
    partial = (by_block > 0).any(1) & ~full
    return BlockMask.from_kv_blocks(
        *_listed(partial),
        *_listed(full),
        BLOCK_SIZE=BLOCK_SIZE,
        mask_mod=_mask_mod(layout, window),
        seq_lengths=(num_tokens, num_tokens),
    )


def _visible_in_blocks(layout: SharedLayout, window: int | None) -> Tensor:
    """[T, blocks] int64: how many keys of each block a token sees.

    In positions these are one interval, up to the token's own. In the row they are two: one in the
    prefix, empty for the prefix' own tokens, and one in the part that the token stands in.
    """
    rows = torch.arange(layout.num_tokens, device=layout.device)
    positions = layout.position_ids
    group_start = torch.searchsorted(layout.group_ids, layout.group_ids)
    parts = layout.group_ids * (layout.tail_ids.max() + 1) + layout.tail_ids  # in the row's order
    part_start = torch.searchsorted(parts, parts)
    part_position = positions - (rows - part_start)  # where the part begins: 0, or a prefix' length
    first = torch.zeros_like(rows) if window is None else (positions - window + 1).clamp(min=0)
    in_prefix = _overlaps(group_start + first, group_start + part_position)
    in_part = _overlaps(part_start + (first - part_position).clamp(min=0), rows + 1)
    return in_prefix + in_part


def _overlaps(
    starts: Tensor,  # [T]
    ends: Tensor,  # [T]
) -> Tensor:
    """[T, blocks]: the length of each interval's overlap with each block."""
    blocks = torch.arange(0, len(starts), BLOCK_SIZE, device=starts.device)
    low = torch.maximum(starts[:, None], blocks)
    high = torch.minimum(ends[:, None], blocks + BLOCK_SIZE)
    return (high - low).clamp(min=0)


def _listed(
    blocks: Tensor,  # [blocks, blocks] bool
) -> tuple[Tensor, Tensor]:
    """How many key blocks each block of queries has, and which, in front of all others."""
    counts = blocks.sum(1, dtype=torch.int32)
    indices = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return counts[None, None], indices[None, None]


def _mask_mod(layout: SharedLayout, window: int | None) -> Callable[..., Tensor]:
    """What attends to what, of one query and one key."""
    group, tail, position = layout.group_ids, layout.tail_ids, layout.position_ids

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same_sequence = (tail[key] == 0) | (tail[key] == tail[query])
        return (query >= key) & (group[query] == group[key]) & same_sequence

    if window is None:
        return sees
    reach = window

    def sees_in_window(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(batch, head, query, key) & (position[query] - position[key] < reach)

    return sees_in_window


def _capped(softcap: float) -> Callable[..., Tensor]:
    def cap(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


def _batched(
    states: Tensor,  # [T, H, D]
) -> Tensor:
    """[1, H, T, D], heads padded with zeros to what the kernels take."""
    missing = max(_MIN_HEAD_DIM - states.shape[-1], 0)
    return (F.pad(states, (0, missing)) if missing else states).transpose(0, 1)[None]


@functools.cache
def _more_variants() -> Any:
    """One context for all calls: each that is made leaves a little memory behind."""
    return torch._dynamo.config.patch(recompile_limit=_MAX_VARIANTS)


@functools.cache
def _compiled() -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(flex_attention, fullgraph=True)
    return compiled
