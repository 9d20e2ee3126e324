"""Messages that a file holds as JSON text are messages; those that Python printed are refused."""

from __future__ import annotations

import json

import pytest

from dpofast.data import load_preferences
from dpofast.data.reading.formats import read_pairs
from dpofast.data.reading.row_error import RowError
from tests.data.builders import assistant, plain_rows, system, user, write_rows

PROMPT, A, B = [system("Be terse."), user("2+2?")], [assistant("4")], [assistant("5")]
FORMS = {
    "prompt": {"prompt": PROMPT, "chosen": A, "rejected": B},
    "messages": {"messages": PROMPT, "chosen": A[0], "rejected": B[0]},
    "conversations": {
        "conversations": [
            {"from": "system", "value": "Be terse."},
            {"from": "human", "value": "2+2?"},
        ],
        "chosen": {"from": "gpt", "value": "4"},
        "rejected": {"from": "gpt", "value": "5"},
    },
    "text and whole": {"prompt": "2+2?", "chosen": [*PROMPT, *A], "rejected": [*PROMPT, *B]},
    "implicit": {"chosen": [*PROMPT, *A], "rejected": [*PROMPT, *B]},
    "swift": {"messages": [*PROMPT, *A], "rejected_response": "5"},
    "LLaMA-Factory": {"chosen_messages": [*PROMPT, *A], "rejected_messages": [*PROMPT, *B]},
}


def read(row):
    (pair,) = read_pairs(row, list(row), {})
    return pair


def written(row, write):
    return {k: v if isinstance(v, str) else write(v) for k, v in row.items()}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_json_text_reads_as_the_messages_themselves(form):
    pair = read(written(form, lambda value: f" {json.dumps(value)}\n"))
    assert pair == read(form)
    assert pair.values == {"prompt": PROMPT, "chosen": A, "rejected": B}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_messages_printed_by_python_are_refused(form):
    with pytest.raises(RowError, match="as Python prints them"):
        read(written(form, str))


def test_messages_printed_by_numpy_are_refused():
    text = "[{'content': '2+2?', 'role': 'user'}\n {'content': 'Yes', 'role': 'assistant'}]"
    with pytest.raises(RowError, match="prompt is messages as Python prints them"):
        read({"prompt": text, "chosen": "4", "rejected": "5"})


@pytest.mark.parametrize("blank", ["", " "])
@pytest.mark.parametrize("write", [json.dumps, list])
def test_an_empty_cell_beside_messages_is_an_empty_answer(write, blank):
    for start in ({}, {"prompt": "2+2?"}):
        pair = read({**start, "chosen": write([*PROMPT, *A]), "rejected": blank})
        assert (pair.kind, pair.blank) == ("messages", "rejected")


TEXTS = (
    '[{"role": "admin"}]',
    '[{"name": "a"}]',
    '{"role": "user", "content": "a"}',
    "[1, 2]",
    "[]",
    "{'role': 'user'}",
    "[{",
    '[{"role": "user", "content": "a"}] is a list of messages',
)


@pytest.mark.parametrize("text", TEXTS)
def test_other_json_is_text(text):
    row = {"prompt": "Write JSON.", "chosen": text, "rejected": text + " "}
    assert read(row).values == row


def test_one_answer_in_json_beside_a_text_is_an_answer_about_messages():
    for text in (json.dumps([*PROMPT, *A]), str([*PROMPT, *A])):
        row = {"prompt": "Write messages.", "chosen": text, "rejected": "I can't."}
        assert read(row).values == row
        assert read({**row, "prompt": PROMPT}).values["chosen"] == [assistant(text)]


def test_the_same_pairs_from_a_csv_file(tmp_path):
    rows = [FORMS["prompt"], {**FORMS["prompt"], "chosen": [assistant('say "6",\nplease')]}]
    path = write_rows(tmp_path / "a.csv", [written(row, json.dumps) for row in rows])
    assert load_preferences(path).to_list() == load_preferences(rows).to_list()


def test_the_normal_form_is_read_again_from_its_json_texts():
    odd = [{**assistant(None), "tool_calls": [{"b": 1, "a": None}]}, assistant("4")]
    once = load_preferences([FORMS["prompt"], {**FORMS["prompt"], "chosen": odd}])
    again = load_preferences(once.to_list())
    assert again.to_list() == once.to_list()
    assert plain_rows(again)[1]["chosen"] == odd
    assert list(odd[0]) == list(plain_rows(again)[1]["chosen"][0])
