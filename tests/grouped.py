"""Pairs of which several have the same prompt."""

from __future__ import annotations

import random
from collections.abc import Sequence

from datasets import Dataset

from tests.support import VOCAB_SIZE

SIZES = (6, 1, 3, 1, 3, 2, 3, 1, 1, 1)  # 22 pairs of 10 prompts


def grouped_pairs(
    sizes: Sequence[int] = SIZES, seed: int = 0, lengths: tuple[int, int] = (1, 14)
) -> Dataset:
    """Tokenised pairs with this many of each prompt, which don't follow each other.

    Args:
        sizes: number of pairs of each prompt.
        seed: seed of ids, lengths and order.
        lengths: fewest and most tokens of an answer.
    """
    rng = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randint(low, high))]

    rows = []
    for size in sizes:
        prompt = ids(1, 12)
        for _ in range(size):
            rows.append(
                {"prompt_ids": prompt, "chosen_ids": ids(*lengths), "rejected_ids": ids(*lengths)}
            )
    rng.shuffle(rows)
    return Dataset.from_list(rows)
