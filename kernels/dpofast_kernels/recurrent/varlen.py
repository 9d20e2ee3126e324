"""Recurrences with a state over packed rows, by kernels that run many sequences in one call."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from dpofast_kernels.recurrent.parts import RowParts


class VarlenScan(Protocol):
    """A recurrence over the tokens of N sequences, which follow each other in one row."""

    def __call__(
        self,
        inputs: Sequence[Tensor],
        initial_states: Tensor | None,
        bounds: Tensor,
        keeps_states: bool,
        /,
    ) -> tuple[Tensor, Tensor | None]:
        """Runs the recurrence.

        Args:
            inputs: each [1, L, ...], whatever the recurrence takes for each token.
            initial_states: [N, ...], the state before each sequence; None if they begin there.
            bounds: [N + 1] int64 on the inputs' device: 0, and where each sequence ends.
            keeps_states: True if the final states are needed.

        Returns:
            [1, L, ...] outputs, and [N, ...] states after the sequences if they are needed.
        """


def shared_varlen_scan(
    scan: VarlenScan,
    inputs: Sequence[Tensor],  # each [1, T, ...]
    parts: RowParts,
) -> Tensor:
    """A recurrence over the sequences in a packed row, in two calls; the same as `shared_scan`.

    The first call runs all prefixes. The second one runs all tails, each from the final state of
    its prefix. Without tails there is no second call.

    Args:
        scan: the recurrence of several sequences.
        inputs: inputs of a packed row, any dtypes.
        parts: the parts of the row, T tokens together.

    Returns:
        [1, T, ...] outputs, in the row's order.

    Raises:
        ValueError: `scan` didn't give a final state for each prefix though tails start from them.
    """
    numbers = range(len(parts.lengths))
    firsts = [number for number in numbers if parts.prefixes[number] is None]
    tails = [(number, prefix) for number, prefix in enumerate(parts.prefixes) if prefix is not None]
    # Split once. If every part were a slice, its backward would allocate a gradient of the row.
    split = [torch.split(each, list(parts.lengths), 1) for each in inputs]
    outputs: dict[int, Tensor] = {}

    def run(chosen: Sequence[int], states: Tensor | None, keeps_states: bool) -> Tensor | None:
        lengths = tuple(parts.lengths[number] for number in chosen)
        row = [torch.cat([pieces[number] for number in chosen], 1) for pieces in split]
        output, final = scan(row, states, _bounds(lengths, row[0].device), keeps_states)
        outputs.update(zip(chosen, torch.split(output, list(lengths), 1), strict=True))
        return final

    states = run(firsts, None, bool(tails))
    if tails:
        by_prefix = dict(zip(firsts, _of_each(states, len(firsts)), strict=True))
        run(
            [tail for tail, _ in tails],
            torch.cat([by_prefix[prefix] for _, prefix in tails]),
            False,
        )
    return torch.cat([outputs[number] for number in numbers], 1)


def _of_each(states: Tensor | None, count: int) -> tuple[Tensor, ...]:
    """The final state of each of `count` prefixes, each [1, ...].

    Raises:
        ValueError: there are more or fewer of them, or none.
    """
    found = 0 if states is None else len(states)
    if states is None or found != count:
        raise ValueError(
            f"The recurrence gave {found} final states for {count} shared prefixes, so it doesn't "
            "keep the sequences of a row apart; use one that takes the bounds of sequences."
        )
    return torch.split(states, 1)


@functools.lru_cache(maxsize=16)
def _bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """[N + 1] int64: 0, and where each sequence ends.

    All layers of a row get the same tensor: it is copied to the device once, and kernels may keep
    what they compute from it. An inference tensor could not be kept for a later backward.
    """
    with torch.inference_mode(False):
        return torch.tensor((0, *lengths)).cumsum(0).to(device, non_blocking=True)
