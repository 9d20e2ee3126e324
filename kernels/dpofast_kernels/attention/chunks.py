"""Attention in chunks, by back ends that know none.

A token looks only at tokens of its own chunk, so a chunk is like a sequence by itself. Chunks are
counted from the beginning of each sequence. The chunk in which a prefix ends goes on in each tail,
so it is a group with these tails; every other chunk is a group with one empty tail. With the tokens
in the order of these groups, a row with chunks is a row without. An example with chunks of two
tokens, a prefix a b c, and two tails, d e and f:

    row       a b c d e f
    chunks    a b | c, continued by d and by f | e
    order     a b | c d f | e
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpofast_kernels.attention.call import AttentionCall
from dpofast_kernels.attention.layout import SharedLayout, build_layout

# A run of consecutive tokens of a row: the place of the first one, and their number.
_Run = tuple[int, int]


@dataclass(frozen=True, eq=False)
class ChunkedRow:
    """A row whose chunks are groups of their own.

    Attributes:
        layout: layout of the tokens in the chunks' order.
        order: [T] int64, the places in the row of the tokens in the chunks' order.
        inverse: [T] int64, the places in the chunks' order of the row's tokens.
    """

    layout: SharedLayout
    order: Tensor
    inverse: Tensor


# A chunked row serves all layers of a step, and is freed with its layout.
_CHUNKED_ROWS: WeakKeyDictionary[SharedLayout, dict[int, ChunkedRow]] = WeakKeyDictionary()


def attention_in_chunks(
    attention: Callable[[AttentionCall], Tensor], call: AttentionCall, chunk: int
) -> Tensor:
    """[T, Hq, Dv] by a back end that knows no chunks.

    Args:
        attention: the back end.
        call: its arguments, with tokens in the row's order.
        chunk: number of positions in a chunk.
    """
    row = chunked_row(call.layout, chunk)
    query, key, value = (
        _reordered(states, row.order, row.inverse) for states in (call.query, call.key, call.value)
    )
    options = replace(call.options, chunk=None)
    out = attention(AttentionCall(query, key, value, row.layout, options))
    return _reordered(out, row.inverse, row.order)


def chunked_row(layout: SharedLayout, chunk: int) -> ChunkedRow:
    """The chunks of a row; made once for each layout and size of chunks."""
    rows = _CHUNKED_ROWS.setdefault(layout, {})
    if chunk not in rows:
        parts = list(_chunks(layout.groups, chunk))
        places = [
            torch.arange(start, start + length)
            for prefix, tails in parts
            for start, length in (prefix, *tails)
        ]
        order = torch.cat(places)
        groups = [(prefix[1], [length for _, length in tails]) for prefix, tails in parts]
        rows[chunk] = ChunkedRow(
            build_layout(groups).to(layout.device),
            order.to(layout.device, non_blocking=True),
            order.argsort().to(layout.device, non_blocking=True),
        )
    return rows[chunk]


def _chunks(
    groups: Sequence[tuple[int, Sequence[int]]], chunk: int
) -> Iterator[tuple[_Run, list[_Run]]]:
    """The prefix and the tails of the group that each chunk is.

    Args:
        groups: length of the prefix and lengths of the tails of each group of the row.
        chunk: number of positions in a chunk.
    """
    start = 0
    for prefix, tails in groups:
        open_length = prefix % chunk  # tokens of the prefix in the chunk that the tails continue
        yield from _whole_chunks(start, prefix - open_length, chunk)
        start += prefix
        heads, rests = [], []
        for length in tails:
            head = min(chunk - open_length, length) if open_length else 0
            heads.append((start, head))
            rests.append((start + head, length - head))
            start += length
        if open_length:
            yield (start - sum(tails) - open_length, open_length), heads
        for rest in rests:
            yield from _whole_chunks(*rest, chunk)


def _whole_chunks(start: int, length: int, chunk: int) -> Iterator[tuple[_Run, list[_Run]]]:
    """The chunks of consecutive tokens that begin with a chunk; the last one can be shorter."""
    for offset in range(0, length, chunk):
        yield (start + offset, min(chunk, length - offset)), [(start + length, 0)]


def _reordered(states: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """[T, H, D]: states[order]."""
    reordered: Tensor = _Reorder.apply(states, order, inverse)  # type: ignore[no-untyped-call]
    return reordered


class _Reorder(torch.autograd.Function):
    """states[order], whose backward is a lookup, too; PyTorch's own uses atomics on a GPU."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse = inverse
        return states.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_reordered: Tensor) -> tuple[Tensor, None, None]:
        return d_reordered.index_select(0, ctx.inverse), None, None
