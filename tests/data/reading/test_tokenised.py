"""Rows of token ids, under the names here and under those of older tools."""

from __future__ import annotations

import pytest

from dpofast.data.reading.formats import read_pairs
from dpofast.data.reading.row_error import RowError

OURS = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]}
OLD = {"prompt_input_ids": [1, 2], "chosen_input_ids": [3], "rejected_input_ids": [4, 5]}
MASKS = {
    "prompt_attention_mask": [1, 1],
    "chosen_attention_mask": [1],
    "rejected_attention_mask": [1, 1],
}
# With the prompt in front of the answers, as the labels tell.
REPEATED = {
    "prompt_input_ids": [1, 2],
    "chosen_input_ids": [1, 2, 3],
    "rejected_input_ids": [1, 2, 4, 5],
    "chosen_labels": [-100, -100, 3],
    "rejected_labels": [-100, -100, 4, 5],
}


def read(row):
    (pair,) = read_pairs(row, list(row), {})
    return pair


@pytest.mark.parametrize(
    "row",
    [
        OURS,
        OLD,
        {**OLD, **MASKS},
        {**OLD, "chosen_labels": [3], "rejected_labels": [4, 5]},
        REPEATED,
        {**REPEATED, "chosen_attention_mask": [1, 1, 1]},
        {**OLD, "chosen": "a", "rejected": "b", "prompt": None},
    ],
)
def test_ids(row):
    pair = read(row)
    assert (pair.kind, pair.values, pair.blank) == ("ids", OURS, None)
    assert pair.used & set(row) == set(row) - {"prompt", "chosen", "rejected"}


def test_one_answer_may_begin_with_the_ids_of_the_prompt():
    row = {**OLD, "chosen_input_ids": [1, 2, 3]}
    assert read(row).values == {**OURS, "chosen_ids": [1, 2, 3]}


@pytest.mark.parametrize("column", ["chosen_ids", "rejected_ids"])
def test_no_ids_are_an_empty_answer(column):
    assert read({**OURS, column: []}).blank == column.removesuffix("_ids")


def test_reference_log_probs_go_with_ids():
    logps = {"ref_chosen_logps": -1.5, "ref_rejected_logps": -2.0}
    pair = read({**OLD, **logps})
    assert pair.values == {**OURS, **logps}
    assert pair.used >= set(logps)


BAD = {
    "padding": ({**OLD, "chosen_input_ids": [3, 0], "chosen_attention_mask": [1, 0]}, "padding"),
    "short mask": ({**OLD, "prompt_attention_mask": [1]}, "prompt_attention_mask is not 1"),
    "mask of text": ({**OLD, "prompt_attention_mask": "11"}, "not a list of integers"),
    "no prompt": ({**OLD, "prompt_input_ids": []}, "prompt_input_ids is empty"),
    "negative": ({**OLD, "chosen_input_ids": [-100]}, "chosen_input_ids holds -100"),
    "text": ({**OLD, "chosen_input_ids": "3"}, "chosen_input_ids is not a list of token ids"),
    "repeated, no labels": (
        {**OLD, "chosen_input_ids": [1, 2, 3], "rejected_input_ids": [1, 2, 4]},
        "both begin with all of prompt_input_ids",
    ),
    "one label": ({**REPEATED, "chosen_labels": None}, "only one of chosen_labels and"),
    "label of the prompt": ({**REPEATED, "chosen_labels": [1, 2, 3]}, "chosen_labels doesn't"),
    "unscored token": (
        {**REPEATED, "rejected_labels": [-100, -100, -100, 5]},
        "rejected_labels doesn't",
    ),
    "other label": ({**REPEATED, "chosen_labels": [-100, -100, 4]}, "chosen_labels doesn't"),
    "no prompt column": ({**OLD, "prompt_input_ids": None}, "has no prompt_input_ids"),
    "no rejected column": ({"prompt_ids": [1], "chosen_ids": [2]}, "has no rejected_ids"),
}


@pytest.mark.parametrize(("row", "text"), BAD.values(), ids=BAD.keys())
def test_broken_ids(row, text):
    with pytest.raises(RowError, match=text):
        read(row)
