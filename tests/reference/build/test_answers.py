"""Answers are read from any dataset of tokenised pairs, and refused from anything else."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset

from dpofast.errors import DataError
from dpofast.reference.build.answers import read_answers
from tests.reference.stubs import pairs


def narrow_schema(schema):
    return pa.schema([pa.field(name, pa.large_list(pa.int32())) for name in schema.names])


def test_answers_of_a_dataset_whatever_its_column_types_and_order():
    dataset = pairs(30)
    table = dataset.data.table
    narrow = Dataset(table.cast(narrow_schema(table.schema))).select([3, 1, 2])
    wide = read_answers(dataset)
    answers = read_answers(narrow)
    for place, pair in enumerate([3, 1, 2]):
        for side in (0, 1):
            assert answers.ids(2 * place + side) == wide.ids(2 * pair + side)
            np.testing.assert_array_equal(
                answers.keys[2 * place + side], wide.keys[2 * pair + side]
            )
    pair = dataset[3]
    assert answers.ids(1) == (pair["prompt_ids"], pair["rejected_ids"])
    assert answers.lengths(np.array([1])) == len(pair["prompt_ids"]) + len(pair["rejected_ids"])


def test_names_of_answers_are_those_of_their_source():
    dataset = pairs(3).add_column("row", [4, 7, 9])
    assert read_answers(dataset).name(3) == "row 7 (rejected)"
    assert read_answers(pairs(3)).name(4) == "row 2 (chosen)"
    mixed = dataset.add_column("source", ["a.json"] * len(dataset))
    assert read_answers(mixed).name(3) == "a.json, row 7 (rejected)"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt_ids": [[1]], "chosen_ids": [[2]]}, "rejected_ids"),
        ({"prompt_ids": ["a"], "chosen_ids": [[2]], "rejected_ids": [[3]]}, "prompt_ids.*string"),
        ({"prompt_ids": [[1], None], "chosen_ids": [[2]] * 2, "rejected_ids": [[3]] * 2}, "Row 1"),
        ({"prompt_ids": [[1]], "chosen_ids": [[2, None]], "rejected_ids": [[3]]}, "Row 0.*chosen"),
    ],
)
def test_what_is_not_tokenised_pairs_is_refused(columns, message):
    with pytest.raises(DataError, match=message):
        read_answers(Dataset.from_dict(columns))


def test_an_empty_dataset_has_no_answers():
    assert len(read_answers(pairs(3).select([])).keys) == 0
