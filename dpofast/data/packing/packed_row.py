"""Micro-batches as one packed row: each shared prefix appears once, and nothing is padded."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from dpofast.data.packing.batch import PackedPairs, PromptAnswer
from dpofast.data.prefix import common_prefix_length
from dpofast_kernels.attention import build_layout


def collate_packed(
    sequences: Sequence[PromptAnswer],
    ref_logps: Sequence[float] | None = None,
    share: bool = True,
    by_prompt: bool = False,
    scores_prompts: bool = False,
) -> PackedPairs:
    """Lay out (prompt ids, answer ids) sequences in one row [1, T].

    The row consists of groups: `prefix | tail | tail | ...`. The prefix is the longest one that
    all sequences of the group have in common, and can reach into the answers. A tail is the rest
    of one sequence. Its tokens attend to the prefix and to the tail itself, and their positions
    continue from the end of the prefix.

    Args:
        sequences: S sequences with at least one prompt token and one answer token each.
        ref_logps: one summed reference log-prob per sequence, in nats.
        share: group the two sequences of each pair; False makes every sequence its own group.
        by_prompt: with `share`, group all consecutive sequences that have the same prompt.
        scores_prompts: score the prompts of chosen sequences, too; the sequences are pairs then.
    """
    row: list[int] = []
    groups: list[tuple[int, list[int]]] = []  # tokens in the prefix and in each tail
    uses: list[int] = []
    scored: list[Tensor] = []
    prompts: list[Tensor] = []  # of every sequence
    for group in _group_sequences(sequences, share, by_prompt):
        ids = [[*prompt, *answer] for prompt, answer in group]
        prefix, tails = _prefix_and_tails(ids)
        prefix_start = len(row)
        row += ids[0][:prefix]
        uses += [len(group)] * prefix
        for sequence, (prompt, _) in zip(ids, group, strict=True):
            # Positions within the sequence whose tokens predict its later tokens.
            positions = torch.arange(len(sequence) - 1)
            # Positions before `prefix` are in the shared prefix: the prompt's last token, and more
            # if the answers begin alike. The others are in this sequence's tail, which is appended
            # to the row next. Adding an offset turns both into positions in the row.
            tail_start = len(row) - prefix
            places = positions + torch.where(positions < prefix, prefix_start, tail_start)
            prompts.append(places[: len(prompt) - 1])
            scored.append(places[len(prompt) - 1 :])
            row += sequence[prefix:]
            uses += [1] * (len(sequence) - prefix)
        groups.append((prefix, tails))
    if not groups:
        # A rank without pairs still runs one token, because other ranks wait for its collectives.
        row, uses, groups = [0], [1], [(1, [0])]
    layout = build_layout(groups)
    return PackedPairs.from_sequences(
        sequences,
        ref_logps,
        input_ids=torch.tensor(row)[None],
        position_ids=layout.position_ids[None],
        scored_positions=scored,
        uses=torch.tensor(uses)[None],
        shared_layout=layout,
        prompt_positions=prompts[0::2] if scores_prompts else None,
    )


def packed_tokens(
    sequences: Sequence[PromptAnswer], share: bool = True, by_prompt: bool = False
) -> int:
    """Length of the row that `collate_packed` makes, without making it."""
    lengths = [
        _prefix_and_tails([[*prompt, *answer] for prompt, answer in group])
        for group in _group_sequences(sequences, share, by_prompt)
    ]
    return sum(prefix + sum(tails) for prefix, tails in lengths) or 1  # an empty row has one token


def _group_sequences(
    sequences: Sequence[PromptAnswer], share: bool, by_prompt: bool
) -> list[list[PromptAnswer]]:
    if share and by_prompt:
        return [list(group) for _, group in groupby(sequences, key=lambda pair: [*pair[0]])]
    size = 2 if share else 1
    return [list(sequences[start : start + size]) for start in range(0, len(sequences), size)]


def _prefix_and_tails(ids: Sequence[Sequence[int]]) -> tuple[int, list[int]]:
    """Tokens in the prefix that all sequences of a group share, and in the tail of each.

    A sequence in a group of its own is all prefix, with an empty tail.
    """
    prefix = min(common_prefix_length(ids[0], other) for other in ids)
    return prefix, [len(sequence) - prefix for sequence in ids]
