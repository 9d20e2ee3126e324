"""The hash of a dataset's ids: the same for the same content, however it is stored."""

from __future__ import annotations

import datasets

from dpofast.data import data_fingerprint, load_preferences, tokenize_preferences
from tests.data.builders import random_rows


def tokenised(rows):
    return tokenize_preferences(load_preferences(rows), None, max_length=None)[0]


def test_the_fingerprint_knows_content_and_order():
    rows = random_rows(30)
    pairs = tokenised(rows)
    fingerprint = data_fingerprint(pairs)
    assert fingerprint == data_fingerprint(tokenised(rows))
    assert fingerprint == data_fingerprint(datasets.Dataset.from_list(rows)), "int64, no rows"
    halves = [pairs.select(range(11)), pairs.select(range(11, len(pairs)))]
    assert fingerprint == data_fingerprint(datasets.concatenate_datasets(halves))
    order = list(range(len(pairs)))
    order[:2] = [1, 0]
    assert fingerprint != data_fingerprint(pairs.select(order))
    moved = [dict(row) for row in rows]
    moved[4] = {**moved[4], "prompt_ids": [*moved[4]["prompt_ids"], 1]}
    assert fingerprint != data_fingerprint(tokenised(moved))


def test_a_token_that_moves_over_a_border_changes_the_fingerprint():
    def of(first, second):
        rows = [{"prompt_ids": p, "chosen_ids": [8], "rejected_ids": [9]} for p in (first, second)]
        return data_fingerprint(datasets.Dataset.from_list(rows))

    assert of([1, 2], [3]) != of([1], [2, 3])
