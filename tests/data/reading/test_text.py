"""Pairs of plain text: the system text in front, and no text that is lost."""

from __future__ import annotations

import pytest

from dpofast.data.reading.formats import read_pairs
from dpofast.data.reading.row_error import RowError

ROW = {"prompt": "Question: 2+2?\nAnswer:", "chosen": " 4", "rejected": " 5"}
HH = "\n\nHuman: 2+2?\n\nAssistant:"
IMPLICIT = {"chosen": HH + " 4", "rejected": HH + " 5"}


def read(row):
    (pair,) = read_pairs(row, list(row), {})
    return pair


@pytest.mark.parametrize(("row", "prompt"), [(ROW, ROW["prompt"]), (IMPLICIT, HH)])
def test_a_system_text_comes_first(row, prompt):
    pair = read({**row, "system": "Be terse."})
    values = {"prompt": f"Be terse.\n\n{prompt}", "chosen": " 4", "rejected": " 5"}
    assert (pair.kind, pair.values) == ("text", values)
    assert "system" in pair.used
    for absent in (None, "", " \n"):
        assert read({**row, "system": absent}).values == {**values, "prompt": prompt}
    with pytest.raises(RowError, match="system is not text"):
        read({**row, "system": ["Be terse."]})


@pytest.mark.parametrize(
    "prompt",
    [
        "Be terse.\n\n2+2?",
        "<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\n2+2?",
        "<|start_header_id|>system<|end_header_id|>\n\nBe terse.<|eot_id|>2+2?",
        "<s>[INST] <<SYS>>\nBe terse.\n<</SYS>>\n\n2+2?",
    ],
)
def test_a_system_text_that_the_prompt_has_already_is_not_repeated(prompt):
    assert read({**ROW, "prompt": prompt, "system": "Be terse."}).values["prompt"] == prompt


def test_words_of_the_system_text_later_in_the_prompt_are_no_system_text():
    values = read({**ROW, "prompt": "He said: Be terse.", "system": "Be terse."}).values
    assert values["prompt"] == "Be terse.\n\nHe said: Be terse."


@pytest.mark.parametrize("empty", ["", " \n"])
def test_an_empty_answer_is_named_and_no_error(empty):
    assert read({**ROW, "rejected": empty}).blank == "rejected"
    assert read({**IMPLICIT, "chosen": empty}).blank == "chosen"
    assert read({**IMPLICIT, "rejected": HH + empty}).blank == "rejected"
    assert read(ROW).blank is read(IMPLICIT).blank is None


@pytest.mark.parametrize("column", ["input", "question", "query"])
def test_a_question_beside_answers_without_a_prompt(column):
    quoted = read({**IMPLICIT, column: "2+2?"})
    assert quoted.values["prompt"] == HH
    assert column in quoted.used
    row = {"chosen": "The sky is blue.", "rejected": "The sky is red.", column: None}
    assert read(row).values["prompt"] == "The sky is"
    with pytest.raises(RowError, match=rf"columns=\{{'prompt': '{column}'\}}"):
        read({**row, column: "What colour is the sky?"})
