"""Where the groups of a packed row stand, and what attention needs to know of them.

A row is a sequence of groups, a group a shared prefix and the tails that go on from it:

    prefix | tail_1 | ... | tail_K | prefix | tail_1 | ...

Attention runs on segments: the queries of a prefix and its first tail, which are neighbours, over
their own keys; those of each further tail over the prefix' keys, copied again, and its own. Each
segment is causal, its queries the last of its keys. Queries and outputs stay where they are in the
row, keys and values are gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SharedLayout:
    """A packed row's structure, as `build_layout` makes it; Z segments.

    Attributes:
        position_ids: [T] int64; tails go on from the prefix' end.
        group_ids: [T] int64, the group of each token, from 0.
        tail_ids: [T] int64, 0 in a prefix, 1 to K in its tails.
        key_rows: [G] int64, the token that each gathered key is a copy of.
        first_copies: [T] int64, where each token's first copy is among the gathered keys.
        later_copies: for the second copies of prefixes, the third ones and so on: the tokens, and
            where these copies are, two [g] int64. No token occurs twice within a pair of these.
        cu_seqlens_q: [Z+1] int32, limits of the segments' queries in the row.
        cu_seqlens_k: [Z+1] int32, limits of the segments' gathered keys.
        query_lengths: of the Z segments, at least 1 each.
        key_lengths: likewise, at least as many as queries.
    """

    position_ids: Tensor
    group_ids: Tensor
    tail_ids: Tensor
    key_rows: Tensor
    first_copies: Tensor
    later_copies: tuple[tuple[Tensor, Tensor], ...]
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """T, the row's length."""
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
        """The same on a device; copies from pinned memory are not waited for."""
        # To the CPU they must be: the host could read them too early.
        non_blocking = torch.device(device).type != "cpu"
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> SharedLayout:
        """The same in page-locked memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> SharedLayout:
        return SharedLayout(
            position_ids=function(self.position_ids),
            group_ids=function(self.group_ids),
            tail_ids=function(self.tail_ids),
            key_rows=function(self.key_rows),
            first_copies=function(self.first_copies),
            later_copies=tuple(
                (function(rows), function(copies)) for rows, copies in self.later_copies
            ),
            cu_seqlens_q=function(self.cu_seqlens_q),
            cu_seqlens_k=function(self.cu_seqlens_k),
            query_lengths=self.query_lengths,
            key_lengths=self.key_lengths,
        )


def build_layout(groups: Sequence[tuple[int, Sequence[int]]]) -> SharedLayout:
    """The layout of a row of groups, on the CPU.

    Args:
        groups: in the row's order, the length of each group's prefix, at least 1, and those of its
            tails, at least one of them. A tail may be of 0 tokens: an answer that another one
            begins with ends where the prefix does.

    Raises:
        ValueError: no groups, a group without prefix or tails, or a length below 0.
    """
    _check_groups(groups)
    row = _Row()
    for prefix, tails in groups:
        row.add_group(prefix, [length for length in tails if length])
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
        key_rows=row.key_rows.ranges(),
        first_copies=row.first_copies.ranges(),
        later_copies=tuple((rows.ranges(), copies.ranges()) for rows, copies in row.later_copies),
        cu_seqlens_q=_limits(row.query_lengths),
        cu_seqlens_k=_limits(row.key_lengths),
        query_lengths=tuple(row.query_lengths),
        key_lengths=tuple(row.key_lengths),
    )


class _Spans:
    """Runs of consecutive numbers, to be made one tensor at the end."""

    def __init__(self) -> None:
        self.spans: list[tuple[int, int]] = []

    def add(self, start: int, length: int) -> None:
        self.spans.append((start, length))

    def ranges(self) -> Tensor:
        starts, lengths = torch.tensor(self.spans).unbind(1)
        return _ranges(starts, lengths)


class _Row:
    """A row as it grows by a group at a time, and the gathered keys beside it."""

    def __init__(self) -> None:
        self.query_lengths: list[int] = []
        self.key_lengths: list[int] = []
        self.key_rows = _Spans()
        self.first_copies = _Spans()
        self.later_copies: list[tuple[_Spans, _Spans]] = []  # tokens, and where the copies are
        self.num_queries = 0
        self.num_keys = 0

    def add_group(self, prefix: int, tails: Sequence[int]) -> None:
        """`tails` without the empty ones, which have no queries."""
        prefix_row = self.num_queries
        first, *later = tails or (0,)
        self._add_segment(prefix + first, 0)
        for number, length in enumerate(later):
            if number == len(self.later_copies):
                self.later_copies.append((_Spans(), _Spans()))
            rows, copies = self.later_copies[number]
            rows.add(prefix_row, prefix)
            copies.add(self.num_keys, prefix)
            self.key_rows.add(prefix_row, prefix)
            self._add_segment(length, prefix)

    def _add_segment(self, num_queries: int, num_before: int) -> None:
        """Queries that have their own keys, and `num_before` copied ones before those."""
        self.key_rows.add(self.num_queries, num_queries)
        self.first_copies.add(self.num_keys + num_before, num_queries)
        self.query_lengths.append(num_queries)
        self.key_lengths.append(num_before + num_queries)
        self.num_queries += num_queries
        self.num_keys += num_before + num_queries


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """The numbers start, start + 1, ..., as many as its length, of one start after the other."""
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
