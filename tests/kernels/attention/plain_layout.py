"""The layout of a packed row, built group by group: a plain twin of `build_layout`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpofast_kernels.attention.layout import CopyRound, SharedLayout


def plain_layout(groups: Sequence[tuple[int, Sequence[int]]]) -> SharedLayout:
    segments = _Segments()
    for prefix, tails in groups:
        segments.add_group(prefix, [length for length in tails if length])
    # The parts of the row: prefixes and tails, each a run of consecutive positions.
    parts = [
        (number, tail, prefix if tail else 0, length)
        for number, (prefix, tails) in enumerate(groups)
        for tail, length in enumerate((prefix, *tails))
    ]
    group_ids, tail_ids, starts, lengths = torch.tensor(parts).unbind(1)
    return SharedLayout(
        position_ids=_ranges(starts, lengths),
        group_ids=group_ids.repeat_interleave(lengths),
        tail_ids=tail_ids.repeat_interleave(lengths),
        key_tokens=segments.key_tokens.numbers(),
        first_copies=segments.first_copies.numbers(),
        later_copies=tuple(
            CopyRound(tokens.numbers(), places.numbers()) for tokens, places in segments.rounds
        ),
        cu_seqlens_q=_limits(segments.query_lengths),
        cu_seqlens_k=_limits(segments.key_lengths),
        query_lengths=tuple(segments.query_lengths),
        key_lengths=tuple(segments.key_lengths),
        groups=tuple((prefix, tuple(tails)) for prefix, tails in groups),
    )


class _Runs:
    """Runs of consecutive numbers, turned into one tensor at the end."""

    def __init__(self) -> None:
        self._runs: list[tuple[int, int]] = []

    def add(self, start: int, length: int) -> None:
        self._runs.append((start, length))

    def numbers(self) -> Tensor:
        starts, lengths = torch.tensor(self._runs).unbind(1)
        return _ranges(starts, lengths)


class _Segments:
    """The segments of a row and their gathered keys, built up group by group."""

    def __init__(self) -> None:
        self.query_lengths: list[int] = []
        self.key_lengths: list[int] = []
        self.key_tokens = _Runs()
        self.first_copies = _Runs()
        self.rounds: list[tuple[_Runs, _Runs]] = []  # tokens and places of each CopyRound
        self.num_queries = 0
        self.num_keys = 0

    def add_group(self, prefix: int, tails: Sequence[int]) -> None:
        """Add a group. `tails` has no empty tails, because they have no queries."""
        prefix_start = self.num_queries
        # If all tails are empty, the prefix is a segment by itself.
        first, *others = tails or (0,)
        self._add_segment(prefix + first, 0)
        for number, length in enumerate(others):
            if number == len(self.rounds):
                self.rounds.append((_Runs(), _Runs()))
            tokens, places = self.rounds[number]
            tokens.add(prefix_start, prefix)
            places.add(self.num_keys, prefix)
            self.key_tokens.add(prefix_start, prefix)
            self._add_segment(length, prefix)

    def _add_segment(self, num_queries: int, num_copied: int) -> None:
        """Add a segment; its keys are `num_copied` keys of a prefix, then those of its queries."""
        self.key_tokens.add(self.num_queries, num_queries)
        self.first_copies.add(self.num_keys + num_copied, num_queries)
        self.query_lengths.append(num_queries)
        self.key_lengths.append(num_copied + num_queries)
        self.num_queries += num_queries
        self.num_keys += num_copied + num_queries


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """start, start + 1, ..., start + length - 1 for each start, one run after the other."""
    offsets = starts - (lengths.cumsum(0) - lengths)
    return offsets.repeat_interleave(lengths) + torch.arange(int(lengths.sum()))


def _limits(lengths: Sequence[int]) -> Tensor:
    return torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)
