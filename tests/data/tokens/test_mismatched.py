"""Each unpaired row gets an answer to another prompt, by a rule that depends on the rows only."""

from __future__ import annotations

import random

import datasets
import pytest

from dpofast.data import with_mismatched
from dpofast.data.tokens.mismatched import mismatched_rows
from dpofast.errors import DataError


def test_prompts_that_are_there_once_get_the_answer_before():
    assert mismatched_rows([0, 1, 2, 3]) == [3, 0, 1, 2]


def test_split_pairs_get_an_answer_of_the_same_side():
    assert mismatched_rows([0, 0, 1, 1, 2, 2]) == [4, 5, 0, 1, 2, 3]


def test_a_run_goes_on_from_the_last_row_to_the_first():
    assert mismatched_rows([0, 1, 2, 0, 0]) == [2, 3, 4, 2, 1]


def test_no_answer_is_to_the_same_prompt():
    rng = random.Random(0)
    for _ in range(200):
        prompts = [rng.randrange(4) for _ in range(rng.randint(2, 12))]
        found = mismatched_rows(prompts)
        if len(set(prompts)) == 1:
            assert found is None
        else:
            assert all(prompts[row] != prompt for row, prompt in zip(found, prompts, strict=True))


def test_the_column_has_the_ids_of_these_answers():
    rows = datasets.Dataset.from_dict(
        {
            "prompt_ids": [[1], [2, 2], [1, 2]],
            "completion_ids": [[7], [8, 8], [9]],
            "label": [True, False, True],
            "row": [0, 1, 2],
        }
    )
    found = with_mismatched(rows, "train")
    assert found["mismatched_ids"][:] == [[9], [7], [8, 8]]
    cut = with_mismatched(rows, "train", max_length=3)
    assert cut["mismatched_ids"][:] == [[9], [7], [8]]
    assert found.remove_columns("mismatched_ids").to_list() == rows.to_list()
    with pytest.raises(DataError, match="train: all 2 rows have the same prompt, and kto compares"):
        with_mismatched(rows.select([0, 0]), "train")
    assert len(with_mismatched(rows.select([]), "train")) == 0


@pytest.mark.parametrize("parts", [1, 3])
def test_the_columns_of_long_tables_are_those_of_their_rows(parts):
    rng = random.Random(parts)

    def ids(low, high):
        return [rng.randrange(9) for _ in range(rng.randint(low, high))]

    rows = [{"prompt_ids": ids(0, 4), "completion_ids": ids(1, 9)} for _ in range(300)]
    size = len(rows) // parts
    table = datasets.concatenate_datasets(
        [datasets.Dataset.from_list(rows[start : start + size]) for start in range(0, 300, size)]
    )
    numbers = {}
    prompts = [numbers.setdefault(tuple(row["prompt_ids"]), len(numbers)) for row in rows]
    found = with_mismatched(table, "train", max_length=8)["mismatched_ids"][:]
    assert found == [
        rows[source]["completion_ids"][: 8 - len(row["prompt_ids"])]
        for row, source in zip(rows, mismatched_rows(prompts), strict=True)
    ]
    assert with_mismatched(table.select([]), "train", max_length=8)["mismatched_ids"][:] == []
