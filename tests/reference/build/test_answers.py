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


def test_answers_of_pooled_pairs_are_those_of_the_pairs_written_out():
    rows = Dataset.from_dict(
        {
            "prompt_ids": [[1, 2], [1, 2], [1, 2], [3]],
            "completion_ids": [[4], [5, 6], [7], [4]],
            "row": [8, 8, 8, 9],
            "completion": [0, 1, 3, 0],
            "source": ["a", "a", "a", "b"],
        }
    )
    index = np.array([[0, 1], [2, 1], [2, 0], [3, 3]])
    chosen, rejected = (rows.select(side)["completion_ids"][:] for side in index.T)
    prompts = rows.select(index[:, 0])["prompt_ids"][:]
    written = {"prompt_ids": prompts, "chosen_ids": chosen, "rejected_ids": rejected}
    plain = read_answers(Dataset.from_dict(written))
    pooled = read_answers(rows, index)
    np.testing.assert_array_equal(pooled.keys[pooled.pairs], plain.keys[plain.pairs])
    np.testing.assert_array_equal(pooled.keys[pooled.first], plain.keys[plain.first])
    for one, other in zip(pooled.pairs.ravel(), plain.pairs.ravel(), strict=True):
        assert pooled.ids(one) == plain.ids(other)
    assert pooled.lengths(np.array([0, 1, 3])).tolist() == [3, 4, 2]
    assert pooled.prompts(np.array([3, 0, 2])).tolist() == [0, 1, 1]
    assert [pooled.name(2), pooled.name(3)] == ["a, row 8 (answer 3)", "b, row 9 (answer 0)"]
    with pytest.raises(DataError, match="no column 'completion_ids'"):
        read_answers(pairs(2), index)


def test_an_empty_dataset_has_no_answers():
    assert len(read_answers(pairs(3).select([])).keys) == 0
