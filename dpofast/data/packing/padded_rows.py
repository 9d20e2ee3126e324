"""Micro-batches with one row per sequence, padded to equal length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dpofast.data.packing.batch import PackedPairs, PromptAnswer, int64_tensor


def collate_padded(
    sequences: Sequence[PromptAnswer],
    ref_logps: Sequence[float] | None = None,
    pad_token_id: int = 0,
    counts: Sequence[int] | None = None,
    scored_prompts: Sequence[int] = (),
) -> PackedPairs:
    """Lay out (prompt ids, answer ids) sequences, each in its own row, padded on the right.

    This is right for every causal model. It needs no mask, because a token never attends to what
    comes after it, and no padding is scored. Attention without a mask is also faster.

    Args:
        sequences: S sequences with at least one prompt token and one answer token each. If there
            are none, the result is one padding token with nothing scored: a rank without pairs
            still has to run the model, because other ranks wait for its collectives.
        ref_logps: one summed reference log-prob per sequence, in nats.
        pad_token_id: fills the ends of the rows; any id in the vocabulary works.
        counts: how often the pairs have each sequence; None for once.
        scored_prompts: sequences whose prompts are scored, too.
    """
    num_rows, width = padded_shape(sequences)
    input_ids = np.full((num_rows, width), pad_token_id, np.int64)  # [S, L]
    uses = np.zeros_like(input_ids)
    # Averages over tokens weight them by `uses`. Without sequences, they would divide by zero.
    uses[:, 0] = 1
    counts = counts or [1] * len(sequences)
    scored, prompts = [], []
    for index, (prompt, answer) in enumerate(sequences):
        length = len(prompt) + len(answer)
        input_ids[index, :length] = [*prompt, *answer]
        uses[index, :length] = counts[index]
        first = index * width + len(prompt) - 1  # the prompt's last token predicts the first label
        scored.append(np.arange(first, first + len(answer)))
        prompts.append(np.arange(index * width, first))
    padded = PackedPairs.from_sequences(
        sequences,
        ref_logps,
        input_ids=int64_tensor(input_ids),
        position_ids=None,
        scored_positions=scored,
        uses=int64_tensor(uses),
        counts=counts,
    )
    return padded.with_prompts([(sequences[i][0], prompts[i]) for i in scored_prompts])


def padded_shape(sequences: Sequence[PromptAnswer]) -> tuple[int, int]:
    """Number and width of the rows that `collate_padded` makes, without making them."""
    width = max((len(prompt) + len(answer) for prompt, answer in sequences), default=1)
    return max(len(sequences), 1), width
