"""Keys and values copied into the order of the segments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpofast_kernels.attention.layout import SharedLayout


def gather_keys(
    states: Tensor,  # [T, H, D]
    layout: SharedLayout,
) -> Tensor:
    """[G, H, D]: the states of one segment after the other; a tail's states follow its prefix's.

    The backward adds up a prefix's gradients without atomics, always in the same order.
    """
    if len(layout.key_tokens) == layout.num_tokens:
        return states  # nothing is shared, so the segments are in the row's order already
    gathered: Tensor = _Gather.apply(states, layout)  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    """states[key_tokens] with a deterministic backward; PyTorch's own uses atomics on a GPU."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, layout: SharedLayout) -> Tensor:
        ctx.layout = layout
        return states.index_select(0, layout.key_tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_gathered: Tensor) -> tuple[Tensor, None]:
        layout: SharedLayout = ctx.layout
        d_states = d_gathered.index_select(0, layout.first_copies)  # [T, H, D]
        for copies in layout.later_copies:
            # No token occurs twice in a round, so read, add and write back can't collide.
            total = d_states.index_select(0, copies.tokens)
            total = total + d_gathered.index_select(0, copies.places)
            d_states.index_copy_(0, copies.tokens, total)
        return d_states, None
