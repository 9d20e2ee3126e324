"""Micro-batches as one packed row: what sequences begin with stands once, and nothing is padded."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby

import torch
from torch import Tensor

from dpofast.data.packing.batch import PackedPairs, TokenIds
from dpofast.data.prefix import common_prefix_length
from dpofast_kernels.attention import build_layout


def collate_packed(
    sequences: Sequence[tuple[TokenIds, TokenIds]],
    ref_logps: Sequence[float] | None = None,
    share: bool = True,
    by_prompt: bool = False,
) -> PackedPairs:
    """Lay out (prompt ids, answer ids) sequences in one row [1, T].

    A group is the longest prefix that its sequences have in common, which may reach into the
    answers, then the rest of each. The tokens of a rest look at the prefix and at themselves, with
    positions that go on from the prefix' end.

    Args:
        sequences: S sequences; both parts of each have at least one token.
        ref_logps: one summed reference log-prob per sequence, in nats.
        share: group the two sequences of each pair; False gives each a group of its own.
        by_prompt: group all neighbours of the same prompt instead, however many.
    """
    row: list[int] = []
    groups: list[tuple[int, list[int]]] = []
    uses: list[int] = []
    scored: list[Tensor] = []
    for group in _groups(sequences, share, by_prompt):
        ids = [[*prompt, *answer] for prompt, answer in group]
        prefix, rests = _lengths(ids)
        prefix_start = len(row)
        row += ids[0][:prefix]
        uses += [len(group)] * prefix
        for sequence, (prompt, _) in zip(ids, group, strict=True):
            # A position before the prefix' end stands there, a later one in the sequence's rest.
            positions = torch.arange(len(prompt) - 1, len(sequence) - 1)
            tail_start = len(row) - prefix
            scored.append(positions + torch.where(positions < prefix, prefix_start, tail_start))
            row += sequence[prefix:]
            uses += [1] * (len(sequence) - prefix)
        groups.append((prefix, rests))
    if not groups:
        row, uses, groups = [0], [1], [(1, [0])]  # something to run, for a rank without pairs
    layout = build_layout(groups)
    empty = torch.empty(0, dtype=torch.int64)
    labels = [torch.tensor(answer) for _, answer in sequences]
    bounds = list(accumulate((len(answer) for _, answer in sequences), initial=0))
    return PackedPairs(
        input_ids=torch.tensor(row)[None],
        position_ids=layout.position_ids[None],
        scored_positions=torch.cat(scored) if scored else empty,
        labels=torch.cat(labels) if labels else empty.clone(),
        bounds=torch.tensor(bounds),
        ref_logps=None if ref_logps is None else torch.tensor(ref_logps, dtype=torch.float64),
        num_tokens=sum(len(prompt) + len(answer) for prompt, answer in sequences),
        uses=torch.tensor(uses)[None],
        shared_layout=layout,
    )


def packed_tokens(
    sequences: Sequence[tuple[TokenIds, TokenIds]], share: bool = True, by_prompt: bool = False
) -> int:
    """Tokens of the row that `collate_packed` makes of some sequences."""
    lengths = [
        _lengths([[*prompt, *answer] for prompt, answer in group])
        for group in _groups(sequences, share, by_prompt)
    ]
    return sum(prefix + sum(rests) for prefix, rests in lengths) or 1  # without any, one that runs


def _groups(
    sequences: Sequence[tuple[TokenIds, TokenIds]], share: bool, by_prompt: bool
) -> list[list[tuple[TokenIds, TokenIds]]]:
    if share and by_prompt:
        return [list(group) for _, group in groupby(sequences, key=lambda each: [*each[0]])]
    size = 2 if share else 1
    return [list(sequences[start : start + size]) for start in range(0, len(sequences), size)]


def _lengths(ids: Sequence[Sequence[int]]) -> tuple[int, list[int]]:
    """Tokens that all sequences of a group begin with, and those of each one's rest.

    One sequence is all prefix.
    """
    prefix = min(common_prefix_length(ids[0], other) for other in ids)
    return prefix, [len(sequence) - prefix for sequence in ids]
