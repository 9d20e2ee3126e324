"""Keys and values in the segments' order."""

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
    """[G, H, D]: those of each segment one after the other, prefixes as often as they are used.

    The backward adds a prefix' gradients without atomics, in the same order each time.
    """
    if len(layout.key_rows) == layout.num_tokens:
        return states  # nothing is shared, and segments stand in the row's order
    gathered: Tensor = _Gather.apply(states, layout)  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    """states[key_rows]. PyTorch's own backward would add with atomics, in an order of its own."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, layout: SharedLayout) -> Tensor:
        ctx.layout = layout
        return states.index_select(0, layout.key_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_gathered: Tensor) -> tuple[Tensor, None]:
        layout: SharedLayout = ctx.layout
        d_states = d_gathered.index_select(0, layout.first_copies)  # [T, H, D]
        for rows, copies in layout.later_copies:
            # Tokens are unique here, so that they can be read, added to and written back.
            total = d_states.index_select(0, rows) + d_gathered.index_select(0, copies)
            d_states.index_copy_(0, rows, total)
        return d_states, None
