"""The layout of a packed row: its groups, and the segments and keys that attention works on.

A row is a sequence of groups. A group is a shared prefix and the tails that continue it:

    prefix | tail_1 | ... | tail_K | prefix | tail_1 | ...

Attention runs on segments. A prefix and its first tail are neighbours in the row, so together they
are one segment: their queries look at their own keys. Each further tail is a segment of its own:
its queries look at a copy of the prefix's keys and at its own keys. Every segment is causal: its n
queries are at the positions of its last n keys.

Queries and outputs stay in the row's order. Keys and values are gathered into the segments' order.
An example with a prefix of two tokens, a b, and three tails, c, d e and f:

    row               a b c d e f          one group, T = 6
    segments          a b c | d e | f      queries, Z = 3
    gathered keys     a b c | a b d e | a b f
    key_tokens        0 1 2   0 1 3 4   0 1 5
    first_copies      0 1 2 5 6 9          places of the first copies of a, b, c, d, e, f
    later_copies      round 1: tokens 0 1, places 3 4
                      round 2: tokens 0 1, places 7 8
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class CopyRound:
    """Further copies of prefix tokens among the gathered keys, at most one of each token.

    Round 1 has the second copies of all prefixes in the row, round 2 the third ones, and so on.
    Because no token occurs twice in a round, its gradients can be added without collisions.

    Attributes:
        tokens: [g] int64, prefix tokens, by their place in the row.
        places: [g] int64, places of these copies among the gathered keys.
    """

    tokens: Tensor
    places: Tensor


@dataclass(frozen=True, eq=False)
class SharedLayout:
    """Structure of a packed row with Z segments, made by `build_layout`.

    Attributes:
        position_ids: [T] int64, positions in the sequence; a tail continues from its prefix's end.
        group_ids: [T] int64, group of each token, from 0.
        tail_ids: [T] int64, 0 in a prefix, 1 to K in its tails.
        key_tokens: [G] int64, token that each gathered key is a copy of.
        first_copies: [T] int64, place of each token's first copy among the gathered keys.
        later_copies: all further copies, grouped into rounds, see `CopyRound`.
        cu_seqlens_q: [Z+1] int32, bounds of the segments' queries in the row.
        cu_seqlens_k: [Z+1] int32, bounds of the segments' keys among the gathered keys.
        query_lengths: number of queries of each segment, at least 1.
        key_lengths: number of keys of each segment, at least its number of queries.
        groups: length of the prefix and lengths of the tails of each group, as in `build_layout`.
    """

    position_ids: Tensor
    group_ids: Tensor
    tail_ids: Tensor
    key_tokens: Tensor
    first_copies: Tensor
    later_copies: tuple[CopyRound, ...]
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    groups: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def num_tokens(self) -> int:
        """T, length of the row."""
        return len(self.position_ids)

    @property
    def device(self) -> torch.device:
        return self.position_ids.device

    @cached_property
    def max_query_length(self) -> int:
        return max(self.query_lengths)

    @cached_property
    def max_key_length(self) -> int:
        """Keys of the longest segment, which is the longest sequence."""
        return max(self.key_lengths)

    def to(self, device: torch.device | str) -> SharedLayout:
        """The same layout on a device. From pinned memory, the host doesn't wait for the copies."""
        # A copy to the CPU must be waited for, or the host could read it too early.
        non_blocking = torch.device(device).type != "cpu"
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> SharedLayout:
        """The same layout in page-locked memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> SharedLayout:
        """The same layout with a function applied to each of its tensors."""
        return SharedLayout(
            position_ids=function(self.position_ids),
            group_ids=function(self.group_ids),
            tail_ids=function(self.tail_ids),
            key_tokens=function(self.key_tokens),
            first_copies=function(self.first_copies),
            later_copies=tuple(
                CopyRound(function(copies.tokens), function(copies.places))
                for copies in self.later_copies
            ),
            cu_seqlens_q=function(self.cu_seqlens_q),
            cu_seqlens_k=function(self.cu_seqlens_k),
            query_lengths=self.query_lengths,
            key_lengths=self.key_lengths,
            groups=self.groups,
        )


def build_layout(groups: Sequence[tuple[int, Sequence[int]]]) -> SharedLayout:
    """The layout of a row of groups, on the CPU.

    Args:
        groups: for each group, in the row's order, the length of its prefix (at least 1) and the
            lengths of its tails (at least one tail). A tail can have 0 tokens: if one answer is the
            beginning of another one, all of it is in the prefix.

    Raises:
        ValueError: there are no groups, a group has no prefix or no tails, or a length is negative.

    Example:
        >>> from dpofast_kernels.attention import build_layout
        >>> layout = build_layout([(2, (1, 2))])  # a prefix of 2 tokens, tails of 1 and 2
        >>> layout.position_ids.tolist()
        [0, 1, 2, 2, 3]
        >>> layout.key_tokens.tolist()  # the second tail gets the prefix's keys again
        [0, 1, 2, 0, 1, 3, 4]
    """
    _check_groups(groups)
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


def _check_groups(groups: Sequence[tuple[int, Sequence[int]]]) -> None:
    if not groups:
        raise ValueError("There are no groups: a row has at least one.")
    for number, (prefix, tails) in enumerate(groups):
        if prefix < 1:
            raise ValueError(
                f"Group {number} has a prefix of {prefix} tokens, expected at least 1: the token "
                "that predicts the tails' first ones stands there."
            )
        if not tails or min(tails) < 0:
            raise ValueError(
                f"Group {number} has tails of {list(tails)} tokens, expected one tail or more, of "
                "at least 0 tokens each."
            )
