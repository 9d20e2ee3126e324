"""Prompts with several answers, made of a preference file's pairs: each has two of the answers."""

from __future__ import annotations

from itertools import combinations
from math import ceil, comb

from datasets import Dataset


def num_pairs(answers: int) -> int:
    """Pairs that so many answers to one prompt make."""
    return comb(answers, 2)


def rows_needed(prompts: int, answers: int) -> int:
    """Rows of a preference file that `answer_pairs` needs."""
    return prompts * ceil(answers / 2)


def answer_pairs(rows: Dataset, prompts: int, answers: int, max_length: int) -> Dataset:
    """All pairs of several answers to each prompt.

    Prompt i of n is that of row i. Its answers are those of the rows i, i + n, i + 2n ..., the
    chosen one of a row before the rejected one, so no answer is taken twice. Of two answers the
    earlier one is chosen: the second answer is rejected in one pair and chosen in others. Two
    answers give the pairs of the rows as they are.

    Args:
        rows: `rows_needed` rows with int lists prompt_ids, chosen_ids, rejected_ids.
        prompts: number of prompts.
        answers: answers to each prompt, at least 2.
        max_length: largest number of tokens in prompt and answer.
    Returns:
        The pairs with the same columns, those of a prompt one after the other.
    Raises:
        ValueError: a prompt with the answer of another row is longer than `max_length`.
    """
    given, pairs = rows.to_list(), []
    for number in range(prompts):
        prompt = given[number]["prompt_ids"]
        of_prompt = [
            row[side] for row in given[number::prompts] for side in ("chosen_ids", "rejected_ids")
        ][:answers]
        longest = len(prompt) + max(map(len, of_prompt))
        if longest > max_length:
            raise ValueError(
                f"Prompt {number} has {longest} tokens with its longest answer, more than the "
                f"race's {max_length}: race fewer steps, which take fewer rows."
            )
        pairs += [
            {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
            for chosen, rejected in combinations(of_prompt, 2)
        ]
    return Dataset.from_list(pairs, features=rows.features)
