"""Attention by compiled FlexAttention, which supports softcaps, sinks, fp32 and ROCm."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from dpofast_kernels.attention.call import AttentionCall
from dpofast_kernels.attention.layout import SharedLayout

BLOCK_SIZE = 128
_MIN_HEAD_DIM = 16  # the smallest head that its kernels can multiply
# FlexAttention is compiled again for each kind of options, with and without gradients, and up to
# three times because rows differ in length. After 8 variants PyTorch would stop compiling, and
# FlexAttention would compute all T x T scores. As we force a compile (fullgraph), hitting the limit
# is an error instead.
_MAX_VARIANTS = 64
# A mask serves all layers of a step, and is freed with its layout.
BLOCK_MASKS: WeakKeyDictionary[SharedLayout, dict[int | None, BlockMask]] = WeakKeyDictionary()


def flex_attention_on_row(call: AttentionCall) -> Tensor:
    """[T, Hq, Dv], without gathered keys: the block mask says which tokens a token looks at.

    A sink takes the share e^sink / (e^sink + sum of e^score) of the softmax. So the output is the
    one without sinks times sigmoid(lse - sink), where lse is the log-sum-exp of the scores.
    """
    options, value_dim = call.options, call.value.shape[-1]
    query, key, value = (_batched(states) for states in (call.query, call.key, call.value))
    with _more_variants():
        out, aux = compiled_flex()(
            query,
            key,
            value,
            score_mod=None if options.softcap is None else _capped(options.softcap),
            block_mask=block_mask(call.layout, options.window),
            scale=call.scale,
            enable_gqa=call.is_grouped,
            return_aux=AuxRequest(lse=True),
        )
    if options.sinks is not None:
        sinks = options.sinks.to(aux.lse.dtype).view(1, -1, 1)
        out = out * torch.sigmoid(aux.lse - sinks)[..., None].to(out.dtype)
    attended: Tensor = out[0, ..., :value_dim].transpose(0, 1)
    return attended


def block_mask(layout: SharedLayout, window: int | None) -> BlockMask:
    """The attention mask in blocks of tokens; made once for each layout and window."""
    masks = BLOCK_MASKS.setdefault(layout, {})
    if window not in masks:
        masks[window] = _make_block_mask(layout, window)
    return masks[window]


def _make_block_mask(layout: SharedLayout, window: int | None) -> BlockMask:
    """The result of create_block_mask, made from intervals instead of a T x T mask."""
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
    """[T, blocks] int64: how many keys of each block a token looks at.

    By their positions in the sequence, these keys are one interval that ends at the token itself.
    By their places in the row they are two intervals: one in the prefix (empty for tokens of the
    prefix) and one in the token's own part, which is its prefix or its tail.
    """
    tokens = torch.arange(layout.num_tokens, device=layout.device)
    positions = layout.position_ids
    group_start = torch.searchsorted(layout.group_ids, layout.group_ids)
    # One number per part. The numbers rise along the row, so searchsorted finds a part's start.
    parts = layout.group_ids * (layout.tail_ids.max() + 1) + layout.tail_ids
    part_start = torch.searchsorted(parts, parts)
    part_position = positions - (tokens - part_start)  # of the part's start: 0 or prefix length
    first = torch.zeros_like(tokens) if window is None else (positions - window + 1).clamp(min=0)
    in_prefix = _overlaps(group_start + first, group_start + part_position)
    in_part = _overlaps(part_start + (first - part_position).clamp(min=0), tokens + 1)
    return in_prefix + in_part


def _overlaps(
    starts: Tensor,  # [T]
    ends: Tensor,  # [T]
) -> Tensor:
    """[T, blocks]: length of the overlap of each interval with each block."""
    blocks = torch.arange(0, len(starts), BLOCK_SIZE, device=starts.device)
    low = torch.maximum(starts[:, None], blocks)
    high = torch.minimum(ends[:, None], blocks + BLOCK_SIZE)
    return (high - low).clamp(min=0)


def _listed(
    blocks: Tensor,  # [blocks, blocks] bool
) -> tuple[Tensor, Tensor]:
    """For each block of queries, how many key blocks are True, and all indices, True ones first."""
    counts = blocks.sum(1, dtype=torch.int32)
    indices = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return counts[None, None], indices[None, None]


def _mask_mod(layout: SharedLayout, window: int | None) -> Callable[..., Tensor]:
    """A function that says whether one query looks at one key; see `attends`."""
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
    """[1, H, T, D], with heads padded by zeros to the smallest size that the kernels take."""
    missing = max(_MIN_HEAD_DIM - states.shape[-1], 0)
    return (F.pad(states, (0, missing)) if missing else states).transpose(0, 1)[None]


@functools.cache
def _more_variants() -> Any:
    """A context with a higher limit of variants. All calls share it: each new one leaks memory."""
    return torch._dynamo.config.patch(recompile_limit=_MAX_VARIANTS)


@functools.cache
def compiled_flex() -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(flex_attention, fullgraph=True)
    return compiled
