"""The hash of a dataset's ids: the same for the same content, however it is stored."""

from __future__ import annotations

import datasets
import pyarrow as pa

from dpofast.data import (
    data_fingerprint,
    load_preferences,
    pairs_fingerprint,
    tokenize_preferences,
)
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


def test_weights_and_confidences_are_part_of_the_fingerprint_of_pairs():
    rows = [{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [n]} for n in (3, 4, 5)]
    pairs = datasets.Dataset.from_list(rows)

    def found(**columns):
        changed = pairs
        for name, values in columns.items():
            changed = changed.add_column(name, pa.array(values, pa.float64()))
        return pairs_fingerprint(changed)

    plain = data_fingerprint(pairs)
    same_as_none = [{}, {"weight": [1, 1, None]}, {"label_confidence": [None] * 3}]
    assert {found(**columns) for columns in same_as_none} == {plain}
    differing = [
        {"weight": [2, 1, 1]},
        {"weight": [1, 2, 1]},
        {"weight": [0.5] * 3},
        {"label_confidence": [0.5] * 3},
        {"label_confidence": [1.0] * 3},
        {"label_confidence": [1.0, None, 1.0]},
        {"weight": [0.5] * 3, "label_confidence": [0.5] * 3},
    ]
    assert len({plain, *(found(**columns) for columns in differing)}) == len(differing) + 1
    assert found(weight=[2, 1, 1]) == found(weight=[2, None, 1])
    assert found(weight=[2, 1, 1]).startswith(plain)
