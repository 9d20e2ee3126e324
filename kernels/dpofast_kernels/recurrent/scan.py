"""Recurrences with a state over packed rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from dpofast_kernels.recurrent.parts import RowParts


class Scan(Protocol):
    """A recurrence over the tokens of one sequence, or of a part of it."""

    def __call__(
        self, inputs: Sequence[Tensor], initial_state: Tensor | None, keeps_state: bool, /
    ) -> tuple[Tensor, Tensor | None]:
        """Runs the recurrence.

        Args:
            inputs: each [1, L, ...], whatever the recurrence takes for each token.
            initial_state: the state before the first token; None for a sequence's beginning.
            keeps_state: True if the final state is needed.

        Returns:
            [1, L, ...] outputs, and the state after the last token if it is needed.
        """


def shared_scan(
    scan: Scan,
    inputs: Sequence[Tensor],  # each [1, T, ...]
    parts: RowParts,
) -> Tensor:
    """A recurrence over the sequences in a packed row, part by part.

    A prefix runs once, and its final state is what each of its tails starts from. So the gradients
    of all tails reach the prefix through this state.

    Args:
        scan: the recurrence of one sequence.
        inputs: inputs of a packed row, any dtypes.
        parts: the parts of the row, T tokens together.

    Returns:
        [1, T, ...] outputs, in the row's order.

    Raises:
        ValueError: `scan` gave no final state though tails start from it.
    """
    continued = parts.continued()
    # Split once. If every part were a slice, its backward would allocate a gradient of the row.
    by_part = zip(*(torch.split(each, list(parts.lengths), 1) for each in inputs), strict=True)
    outputs = []
    states: dict[int, Tensor] = {}
    for number, (prefix, part) in enumerate(zip(parts.prefixes, by_part, strict=True)):
        keeps_state = number in continued
        output, state = scan(part, None if prefix is None else states[prefix], keeps_state)
        outputs.append(output)
        if keeps_state:
            if state is None:
                raise ValueError(
                    "The recurrence gave no final state, from which the tails of a shared prefix "
                    "would start; use one that returns its state."
                )
            states[number] = state
    return torch.cat(outputs, 1)
