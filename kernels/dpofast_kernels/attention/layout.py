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
    parts = _Parts.of(groups)
    segments = _Segments.of(parts)
    return SharedLayout(
        position_ids=_ranges(torch.where(parts.tails > 0, parts.prefixes, 0), parts.lengths),
        group_ids=parts.groups.repeat_interleave(parts.lengths),
        tail_ids=parts.tails.repeat_interleave(parts.lengths),
        key_tokens=segments.key_tokens(),
        first_copies=_ranges(segments.key_starts + segments.copied, segments.query_lengths),
        later_copies=segments.later_copies(),
        cu_seqlens_q=_limits(segments.query_lengths),
        cu_seqlens_k=_limits(segments.key_lengths),
        query_lengths=tuple(segments.query_lengths.tolist()),
        key_lengths=tuple(segments.key_lengths.tolist()),
        groups=tuple((prefix, tuple(tails)) for prefix, tails in groups),
    )


@dataclass(frozen=True, eq=False)
class _Parts:
    """The parts of a row: prefixes and tails, each a run of consecutive positions.

    Attributes:
        lengths: [P] int64, tokens of each part, in the row's order.
        groups: [P] int64, group of each part, from 0.
        tails: [P] int64, 0 for a prefix, 1 to K for its tails.
        prefixes: [P] int64, tokens in the prefix of the part's group.
        ranks: [P] int64, how many tails with tokens the group has up to this part.
    """

    lengths: Tensor
    groups: Tensor
    tails: Tensor
    prefixes: Tensor
    ranks: Tensor

    @classmethod
    def of(cls, groups: Sequence[tuple[int, Sequence[int]]]) -> _Parts:
        lengths = torch.tensor([length for prefix, tails in groups for length in (prefix, *tails)])
        sizes = torch.tensor([1 + len(tails) for _, tails in groups])
        starts = _starts(sizes).repeat_interleave(sizes)  # [P], first part of each part's group
        tails = torch.arange(len(lengths)) - starts
        filled = ((tails > 0) & (lengths > 0)).cumsum(0)
        return cls(
            lengths=lengths,
            groups=torch.arange(len(sizes)).repeat_interleave(sizes),
            tails=tails,
            prefixes=lengths[starts],
            ranks=filled - filled[starts],  # a prefix itself is not counted
        )


@dataclass(frozen=True, eq=False)
class _Segments:
    """The segments of a row. The keys of one are `copied` keys of a prefix, then its queries' own.

    Attributes:
        query_lengths: [Z] int64.
        copied: [Z] int64, keys of the prefix that stand before those of the queries; 0 in a group's
            first segment, which contains the prefix itself.
        prefix_starts: [Z] int64, place of the group's prefix in the row.
        rounds: [Z] int64, number of the CopyRound that the copied keys are in; 0 for none.
    """

    query_lengths: Tensor
    copied: Tensor
    prefix_starts: Tensor
    rounds: Tensor

    @classmethod
    def of(cls, parts: _Parts) -> _Segments:
        is_prefix = parts.tails == 0
        # A tail without tokens has no queries. The first one that has some joins the prefix.
        is_filled = ~is_prefix & (parts.lengths > 0)
        joins = is_filled & (parts.ranks == 1)
        query_lengths = parts.lengths.clone()
        prefixes = is_prefix.nonzero()[:, 0]  # [groups]
        query_lengths.index_add_(0, prefixes[parts.groups[joins]], parts.lengths[joins])
        wanted = is_prefix | (is_filled & ~joins)
        return cls(
            query_lengths=query_lengths[wanted],
            copied=torch.where(is_prefix, 0, parts.prefixes)[wanted],
            prefix_starts=_starts(parts.lengths)[prefixes][parts.groups[wanted]],
            rounds=torch.where(is_prefix, 0, parts.ranks - 1)[wanted],
        )

    @property
    def key_lengths(self) -> Tensor:
        """[Z] int64."""
        return self.copied + self.query_lengths

    @property
    def key_starts(self) -> Tensor:
        """[Z] int64, place of each segment's first key among the gathered keys."""
        return _starts(self.key_lengths)

    def key_tokens(self) -> Tensor:
        """[G] int64, token that each gathered key is a copy of."""
        starts = torch.stack([self.prefix_starts, _starts(self.query_lengths)], 1)  # [Z, 2]
        lengths = torch.stack([self.copied, self.query_lengths], 1)
        return _ranges(starts.flatten(), lengths.flatten())

    def later_copies(self) -> tuple[CopyRound, ...]:
        key_starts = self.key_starts
        # Sorted by their rounds, the segments of a round are neighbours, in the row's order.
        order = self.rounds.argsort(stable=True)
        of_rounds = torch.split(order, self.rounds.bincount().tolist())[1:]
        return tuple(
            CopyRound(
                tokens=_ranges(self.prefix_starts[segments], self.copied[segments]),
                places=_ranges(key_starts[segments], self.copied[segments]),
            )
            for segments in of_rounds
        )


def _starts(lengths: Tensor) -> Tensor:
    """Where each of some runs begins if they follow one another from 0."""
    return lengths.cumsum(0) - lengths


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """start, start + 1, ..., start + length - 1 for each start, one run after the other."""
    offsets = starts - _starts(lengths)
    return offsets.repeat_interleave(lengths) + torch.arange(int(lengths.sum()))


def _limits(lengths: Tensor) -> Tensor:
    """[Z+1] int32, bounds of runs that follow one another from 0."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


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
