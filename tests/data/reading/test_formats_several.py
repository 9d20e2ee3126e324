"""Several rejected answers in a row are one pair each."""

from __future__ import annotations

import json

import pytest

from dpofast.data import load_preferences
from dpofast.data.reading.formats import read_pairs
from dpofast.data.reading.row_error import RowError
from tests.data.builders import assistant, plain_rows, user, write_rows

PROMPT, A, B, C = [user("2+2?")], [assistant("4")], [assistant("5")], [assistant("6")]


def read(row):
    return read_pairs(row, list(row), {})


def answers(row):
    return [(pair.values["chosen"], pair.values["rejected"]) for pair in read(row)]


def test_texts_beside_a_text():
    row = {"prompt": "2+2=", "chosen": "4", "rejected": ["5", "6"]}
    assert answers(row) == [("4", "5"), ("4", "6")]
    assert answers({**row, "rejected": ["5"]}) == [("4", "5")]
    assert {(p.kind, p.columns) for p in read(row)} == {("text", "prompt, chosen, rejected")}


FORMS = {
    "texts": {"prompt": PROMPT, "chosen": "4", "rejected": ["5", "6"]},
    "texts beside a message": {"prompt": PROMPT, "chosen": A[0], "rejected": ["5", "6"]},
    "lists of messages": {"prompt": PROMPT, "chosen": A, "rejected": [B, C]},
    "text and list": {"prompt": PROMPT, "chosen": A, "rejected": ["5", C]},
    "whole conversations": {"chosen": PROMPT + A, "rejected": [PROMPT + B, PROMPT + C]},
    "JSON texts": {"prompt": PROMPT, "chosen": A, "rejected": [json.dumps(B), json.dumps(C)]},
    "swift": {"messages": PROMPT + A, "rejected_response": ["5", "6"]},
    "instruction": {"instruction": "2+2?", "chosen": "4", "rejected": ["5", "6"]},
    "response": {"instruction": "2+2?", "chosen_response": "4", "rejected_response": ["5", "6"]},
    "openai": {
        "input": {"messages": PROMPT},
        "preferred_output": A,
        "non_preferred_output": [B, C],
    },
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_messages(form):
    assert answers(form) == [(A, B), (A, C)]
    assert all(pair.values["prompt"] == PROMPT for pair in read(form))
    assert all(pair.used >= set(form) for pair in read(form))


def test_a_list_of_messages_is_one_answer():
    turns = [assistant("Let me see."), assistant("5")]
    assert answers({"prompt": PROMPT, "chosen": A, "rejected": turns}) == [(A, turns)]
    texts = list(map(json.dumps, turns))
    assert answers({"prompt": PROMPT, "chosen": A, "rejected": texts}) == [(A, turns)]


def test_an_empty_one_is_named_and_the_others_are_pairs():
    row = {"prompt": "2+2=", "chosen": "4", "rejected": ["5", "", "6"]}
    assert [pair.blank for pair in read(row)] == [None, "rejected", None]
    assert read({"prompt": PROMPT, "chosen": A, "rejected": [B, []]})[1].blank == "rejected"
    row["rejected"] = ["5", None]
    assert [pair.blank for pair in read(row)] == [None, "rejected"]
    swift = {"messages": PROMPT + A, "rejected_response": ["5", None]}
    assert [pair.blank for pair in read(swift)] == [None, "rejected"]


@pytest.mark.parametrize("several", [[], [None], [[]]])
@pytest.mark.parametrize(
    "start", [{"prompt": "2+2=", "chosen": "4"}, {"prompt": PROMPT, "chosen": A}]
)
def test_no_answers_at_all_are_one_empty_answer(start, several):
    (pair,) = read({**start, "rejected": several})
    assert pair.blank == "rejected"


@pytest.mark.parametrize("chosen", [A, json.dumps(A)])
@pytest.mark.parametrize("start", [{"prompt": PROMPT}, {"prompt": json.dumps(PROMPT)}])
@pytest.mark.parametrize("several", [[B, C], ["5", "6"], ["5", C], [json.dumps(B), json.dumps(C)]])
def test_several_answers_in_one_json_text(start, chosen, several):
    row = {**start, "chosen": chosen, "rejected": json.dumps(several)}
    assert answers(row) == [(A, B), (A, C)]


def test_several_answers_printed_by_python_are_refused():
    with pytest.raises(RowError, match="rejected is messages as Python prints them"):
        read({"prompt": PROMPT, "chosen": json.dumps(A), "rejected": str([B, C])})


def test_a_list_as_json_beside_a_text_is_an_answer():
    row = {"prompt": "Three in JSON.", "chosen": '["a", "b", "c"]', "rejected": '["a", "b"]'}
    assert answers(row) == [(row["chosen"], row["rejected"])]


def test_reference_log_probs_are_a_list_as_well():
    row = {"prompt": "2+2=", "chosen": "4", "rejected": ["5", "6"], "ref_chosen_logps": -1.0}
    pairs = read({**row, "ref_rejected_logps": [-2.0, -3.0]})
    assert [pair.values["ref_rejected_logps"] for pair in pairs] == [-2.0, -3.0]
    for wrong in (-2.0, [-2.0], None):
        with pytest.raises(RowError, match="needs a list of 2 numbers"):
            read({**row, "ref_rejected_logps": wrong})


BAD = {
    "number": ({"prompt": "a", "chosen": "b", "rejected": ["c", 5]}, r"rejected\[1\] is not text"),
    "numbers": ({"prompt": PROMPT, "chosen": A, "rejected": [5]}, r"rejected\[0\] is not a mess"),
    "inner": (
        {"prompt": PROMPT, "chosen": A, "rejected": [B, [{"content": "a"}]]},
        r"rejected\[1\]\[0\] has neither role",
    ),
    "text and message": (
        {"prompt": PROMPT, "chosen": A, "rejected": ["5", C[0]]},
        r"rejected\[0\] is not a message but str",
    ),
    "messages and message, no prompt": (
        {"prompt": [], "chosen": "", "rejected": [PROMPT + B, C[0]]},
        r"rejected\[0\] is not a message but list",
    ),
    "swift": (
        {"messages": PROMPT + A, "rejected_response": ["5", 6]},
        r"rejected_response\[1\]",
    ),
    "chosen": ({"prompt": "a", "chosen": ["b", "c"], "rejected": "d"}, "chosen is not text but"),
}


@pytest.mark.parametrize(("row", "text"), BAD.values(), ids=BAD.keys())
def test_broken_rows(row, text):
    with pytest.raises(RowError, match=text):
        read(row)


def test_pairs_of_a_row_share_its_number(tmp_path):
    rows = [FORMS["lists of messages"], {"prompt": PROMPT, "chosen": A, "rejected": [C]}]
    path = write_rows(tmp_path / "a.parquet", rows)
    loaded = load_preferences(path)
    assert loaded["row"] == [0, 0, 1]
    assert [row["rejected"] for row in plain_rows(loaded)] == [B, C, C]
    assert load_preferences(loaded.to_list()).to_list() == loaded.to_list()
