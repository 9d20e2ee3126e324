"""Causal convolutions over packed rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dpofast_kernels.recurrent.parts import RowParts

# [1, C, L] -> [1, C, L]; the output at a place depends on the inputs there and just before.
Convolve = Callable[[Tensor], Tensor]


def shared_convolution(
    convolve: Convolve,
    inputs: Tensor,  # [1, C, T]
    width: int,
    parts: RowParts,
) -> Tensor:
    """A causal convolution of the sequences in a packed row, with one call.

    In the row that `convolve` gets, the inputs that a part starts from stand before the part: zeros
    before a prefix, and the prefix's last inputs before a tail. The outputs there are dropped, so
    `convolve` needs to know nothing about the parts.

    Args:
        convolve: the convolution of one sequence, with whatever bias and activation it has.
        inputs: inputs of a packed row, any float dtype.
        width: inputs that an output depends on, its own place included.
        parts: the parts of the row, T tokens together.

    Returns:
        [1, C, T], in the row's order.
    """
    context = width - 1
    continued = parts.continued()
    row = []
    ends: dict[int, Tensor] = {}  # [1, C, context], the last inputs of each prefix
    # Split once. If every part were a slice, its backward would allocate a gradient of the row.
    split = torch.split(inputs, list(parts.lengths), -1)
    for number, (prefix, part) in enumerate(zip(parts.prefixes, split, strict=True)):
        before = part.new_zeros(*part.shape[:-1], context) if prefix is None else ends[prefix]
        row += [before, part]
        if number in continued:
            ends[number] = _last(part, context)
    lengths = [length for each in parts.lengths for length in (context, each)]
    outputs = torch.split(convolve(torch.cat(row, -1)), lengths, -1)
    return torch.cat(outputs[1::2], -1)


def _last(inputs: Tensor, count: int) -> Tensor:
    """The last `count` inputs, after zeros if there are fewer: a sequence starts from zeros."""
    length = inputs.shape[-1]
    return F.pad(inputs[..., max(length - count, 0) :], (max(count - length, 0), 0))
