"""Pairs of which several have the same prompt."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import permutations

from datasets import Dataset

from tests.support import VOCAB_SIZE

SIZES = (6, 1, 3, 1, 6, 2, 3, 1, 1, 4)  # 28 pairs of 10 prompts


def grouped_pairs(
    sizes: Sequence[int] = SIZES, seed: int = 0, lengths: tuple[int, int] = (1, 14)
) -> Dataset:
    """Tokenised pairs with this many of each prompt, which don't follow each other.

    The pairs of a prompt have four answers among them.

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
        prompt, answers = ids(1, 12), [ids(*lengths) for _ in range(4)]
        for one, other in rng.sample([*permutations(answers, 2)], size):
            rows.append({"prompt_ids": prompt, "chosen_ids": one, "rejected_ids": other})
    random.Random(seed).shuffle(rows)  # the order doesn't depend on the lengths
    return Dataset.from_list(rows)
