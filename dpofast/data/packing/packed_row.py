"""Micro-batches as one packed row: each shared prefix appears once, and nothing is padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby, pairwise

import numpy as np

from dpofast.data.packing.batch import PackedPairs, PromptAnswer, int64_tensor
from dpofast.data.prefix import common_prefix_length
from dpofast_kernels.attention import build_layout


def collate_packed(
    sequences: Sequence[PromptAnswer],
    ref_logps: Sequence[float] | None = None,
    share: bool = True,
    group_sizes: Sequence[int] | None = None,
    counts: Sequence[int] | None = None,
    scored_prompts: Sequence[int] = (),
) -> PackedPairs:
    """Lay out (prompt ids, answer ids) sequences in one row [1, T].

    The row consists of groups: `prefix | tail | tail | ...`. The prefix is the longest one that
    all sequences of the group have in common, and can reach into the answers. A tail is the rest
    of one sequence. Its tokens attend to the prefix and to the tail itself, and their positions
    continue from the end of the prefix.

    Args:
        sequences: S sequences with at least one prompt token and one answer token each.
        ref_logps: one summed reference log-prob per sequence, in nats.
        share: share prefixes within groups; False makes every sequence its own group.
        group_sizes: numbers of consecutive sequences that have the same prompt; None for pairs.
        counts: how often the pairs have each sequence; None for once.
        scored_prompts: sequences whose prompts are scored, too.
    """
    row: list[int] = []
    groups: list[tuple[int, list[int]]] = []  # tokens in the prefix and in each tail
    uses: list[int] = []  # of each prefix and each tail
    scored: list[np.ndarray] = []
    prompts: list[np.ndarray] = []  # of every sequence
    counts = counts or [1] * len(sequences)
    for start, end in _groups(len(sequences), share, group_sizes):
        group = sequences[start:end]
        ids = [[*prompt, *answer] for prompt, answer in group]
        prefix, tails = _prefix_and_tails(ids)
        prefix_start = len(row)
        row += ids[0][:prefix]
        uses += [sum(counts[start:end]), *counts[start:end]]
        for sequence, (prompt, _) in zip(ids, group, strict=True):
            places = _predicting_places(len(sequence), prefix, prefix_start, len(row))
            prompts.append(places[: len(prompt) - 1])
            scored.append(places[len(prompt) - 1 :])
            row += sequence[prefix:]
        groups.append((prefix, tails))
    if not groups:
        # A rank without pairs still runs one token, because other ranks wait for its collectives.
        row, uses, groups = [0], [1, 0], [(1, [0])]
    layout = build_layout(groups)
    lengths = [length for prefix, tails in groups for length in (prefix, *tails)]
    packed = PackedPairs.from_sequences(
        sequences,
        ref_logps,
        input_ids=int64_tensor(row)[None],
        position_ids=layout.position_ids[None],
        scored_positions=scored,
        uses=int64_tensor(np.repeat(uses, lengths))[None],
        counts=counts,
        shared_layout=layout,
    )
    return packed.with_prompts([(sequences[i][0], prompts[i]) for i in scored_prompts])


def _predicting_places(length: int, prefix: int, prefix_start: int, tail_start: int) -> np.ndarray:
    """[length - 1] int64: where in the row a sequence's tokens are that predict its later ones.

    Positions before `prefix` are in the shared prefix: the prompt's last token, and more if the
    answers begin alike. The others are in the sequence's tail.

    Args:
        length: tokens of the sequence.
        prefix: tokens of the shared prefix.
        prefix_start, tail_start: where in the row the prefix and the sequence's tail begin.
    """
    places = np.arange(prefix_start, prefix_start + length - 1)
    places[prefix:] += tail_start - (prefix_start + prefix)
    return places


def packed_tokens(
    sequences: Sequence[PromptAnswer], share: bool = True, group_sizes: Sequence[int] | None = None
) -> int:
    """Length of the row that `collate_packed` makes, without making it."""
    lengths = [
        _prefix_and_tails([[*prompt, *answer] for prompt, answer in sequences[start:end]])
        for start, end in _groups(len(sequences), share, group_sizes)
    ]
    return sum(prefix + sum(tails) for prefix, tails in lengths) or 1  # an empty row has one token


def runs_of_prompts(sequences: Sequence[PromptAnswer]) -> list[int]:
    """Numbers of consecutive sequences that have the same prompt."""
    return [len(list(run)) for _, run in groupby(sequences, key=lambda pair: [*pair[0]])]


def _groups(
    num_sequences: int, share: bool, group_sizes: Sequence[int] | None
) -> Iterator[tuple[int, int]]:
    """First and last sequence of each group."""
    if not share:
        group_sizes = [1] * num_sequences
    elif group_sizes is None:
        group_sizes = [2] * (num_sequences // 2)
    return pairwise([0, *accumulate(group_sizes)])


def _prefix_and_tails(ids: Sequence[Sequence[int]]) -> tuple[int, list[int]]:
    """Tokens in the prefix that all sequences of a group share, and in the tail of each.

    A sequence in a group of its own is all prefix, with an empty tail.
    """
    first, *others = ids
    prefix = min((common_prefix_length(first, other) for other in others), default=len(first))
    return prefix, [len(sequence) - prefix for sequence in ids]
