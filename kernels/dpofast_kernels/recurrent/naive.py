"""The naive twin: every sequence of a packed row runs in full, from its own beginning."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dpofast_kernels.recurrent.parts import Groups


def naive_sequences(
    function: Callable[[Sequence[Tensor]], Tensor],
    inputs: Sequence[Tensor],  # each [1, T, ...]
    groups: Groups,
) -> Tensor:
    """The outputs of a causal function for each token of a packed row, [1, T, ...].

    No state and no inputs are passed on: a shared prefix runs once for each of its tails. Its
    outputs are those of the first time, which are the same every time.

    Args:
        function: takes the inputs of one sequence, each [1, L, ...], and returns [1, L, ...].
        inputs: inputs of the packed row.
        groups: as in `RowParts.of`.
    """
    outputs: dict[int, Tensor] = {}
    start = 0
    for prefix, tails in groups:
        shared = list(range(start, start + prefix))
        start += prefix
        for tail in tails:
            tokens = [*shared, *range(start, start + tail)]
            start += tail
            found = function([tensor[:, tokens] for tensor in inputs])
            for place, token in enumerate(tokens):
                outputs.setdefault(token, found[:, place])
    return torch.stack([outputs[token] for token in range(start)], 1)
