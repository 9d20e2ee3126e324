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


# An empty answer as a cell of a table can have it, beside JSON.
HOLLOW = ["[]", "null", "{}", '[{"role": "assistant"}]', '[{"from": "gpt"}]', "", None, [], {}]


@pytest.mark.parametrize("hollow", HOLLOW)
def test_a_cell_without_messages_is_an_empty_answer(hollow):
    for prompt in (json.dumps(PROMPT), PROMPT, "2+2?"):
        row = {"prompt": prompt, "chosen": hollow, "rejected": json.dumps(B)}
        assert read(row).blank == "chosen"
        assert read({**row, "chosen": json.dumps(A), "rejected": hollow}).blank == "rejected"


@pytest.mark.parametrize("cut", [-1, -3, -8, 14, 20])
def test_a_broken_cell_beside_messages_is_refused(cut):
    row = {column: json.dumps(value) for column, value in FORMS["prompt"].items()}
    for column in row:
        with pytest.raises(RowError, match=f"{column} looks like messages as JSON, but"):
            read({**row, column: row[column][:cut]})
    for column in ("chosen", "rejected"):
        whole = {k: json.dumps(v) for k, v in FORMS["implicit"].items()}
        with pytest.raises(RowError, match=f"{column} looks like messages as JSON, but"):
            read({**whole, column: whole[column][:cut]})
        with pytest.raises(RowError, match="chosen looks like messages as JSON, but"):
            read({**whole, "chosen": whole["chosen"][:cut], "rejected": whole["rejected"][:cut]})


@pytest.mark.parametrize("prompt", [PROMPT, json.dumps(PROMPT)])
def test_an_answer_from_the_assistant_as_json_beside_a_text(prompt):
    row = {"prompt": prompt, "chosen": "4", "rejected": "5"}
    for column, messages in (("chosen", A), ("rejected", B)):
        for value in (messages, messages[0]):
            assert read({**row, column: json.dumps(value)}).values == FORMS["prompt"]
            with pytest.raises(RowError, match=f"{column} is messages as Python prints them"):
                read({**row, column: str(value)})


def test_a_single_message_as_json():
    question = [user("2+2?")]
    row = {"prompt": json.dumps(question[0]), "chosen": "4", "rejected": "5"}
    wanted = {"prompt": question, "chosen": A, "rejected": B}
    assert read(row).values == wanted
    row = {"prompt": "2+2?", "chosen": json.dumps(A[0]), "rejected": json.dumps(B[0])}
    assert read(row).values == wanted
    for broken in (
        {"prompt": str(question[0]), "chosen": "4", "rejected": "5"},
        {"prompt": "2+2?", "chosen": str(A[0]), "rejected": str(B[0])},
    ):
        with pytest.raises(RowError, match="as Python prints them"):
            read(broken)


ODD_JSON = {
    "twice": json.dumps(json.dumps(PROMPT)),
    "in an object": json.dumps({"messages": PROMPT}),
    "one a line": "\n".join(map(json.dumps, PROMPT)),
    "JSON texts": json.dumps(list(map(json.dumps, PROMPT))),
    "other keys first": json.dumps([dict(reversed(message.items())) for message in PROMPT]),
}


@pytest.mark.parametrize("text", ODD_JSON.values(), ids=ODD_JSON.keys())
def test_messages_in_other_json(text):
    row = {"prompt": text, "chosen": "4", "rejected": "5"}
    assert read(row).values == FORMS["prompt"]


PRINTED = {
    "another key first": str([{"name": "x", **user("2+2?")}]),
    "an array": "array([{'role': 'user', 'content': '2+2?'}], dtype=object)",
    "an array inside": "[{'content': array([{'type': 'text', 'text': 'a'}], dtype=object), "
    "'role': 'user'}]",
    "a cell of the normal form": str([json.dumps(user("2+2?"))]),
    "two texts of NumPy": "['" + "'\n '".join(map(json.dumps, PROMPT)) + "']",
}


@pytest.mark.parametrize("text", PRINTED.values(), ids=PRINTED.keys())
def test_other_prints_are_refused(text):
    with pytest.raises(RowError, match="prompt is messages as Python prints them"):
        read({"prompt": text, "chosen": "4", "rejected": "5"})


@pytest.mark.parametrize(
    "content",
    [
        "[{'text': 'hi', 'type': 'text'}]",
        '[{"text": "hi", "type": "text"}]',
        "{'type': 'text', 'text': 'hi'}",
        str([user("2+2?")]),
        json.dumps([user("2+2?")]),
    ],
)
def test_a_content_that_was_a_list_is_refused(content):
    with pytest.raises(RowError, match=r"content of prompt\[0\] is .* written as text"):
        read({"prompt": [user(content)], "chosen": "4", "rejected": "5"})


@pytest.mark.parametrize("write", [json.dumps, str])
def test_messages_where_only_a_text_can_be_are_refused(write):
    answers = {"chosen": "4", "rejected": "5"}
    with pytest.raises(RowError, match="instruction is messages as"):
        read({"instruction": write([user("2+2?")]), **answers})
    for prompt in ("2+2?", [user("2+2?")]):
        with pytest.raises(RowError, match="system is messages as"):
            read({"system": write(system("Be terse.")), "prompt": prompt, **answers})


def test_a_text_that_begins_with_messages_is_a_text():
    text = json.dumps(PROMPT) + " Who asks here?"
    row = {"prompt": text, "chosen": "{'role': 'user'}", "rejected": "[{'a': 1}]"}
    assert read(row).values == row


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


BROKEN_PROMPTS = {
    "an object": json.dumps({"messages": PROMPT})[:-3],
    "twice": json.dumps(json.dumps(PROMPT))[:-4],
    "with a model": json.dumps({"model": "m", "messages": PROMPT}),
    "a line break": '[{"role": "user", "content": "a\nb"}]',
    "not a number": "[{'role': 'user', 'content': 'a', 'score': nan}]",
}


@pytest.mark.parametrize("text", BROKEN_PROMPTS.values(), ids=BROKEN_PROMPTS.keys())
def test_prompts_that_are_nearly_messages_are_refused(text):
    with pytest.raises(RowError, match="prompt looks like messages as JSON, but is broken or has"):
        read({"prompt": text, "chosen": "4", "rejected": "5"})
    row = {"prompt": "Write a request.", "chosen": text, "rejected": text + " "}
    assert read(row).values == row, "an answer may be one"


def test_plain_text_is_not_parsed(monkeypatch):
    def parse(*_):
        raise AssertionError("parsed")

    monkeypatch.setattr("json.loads", parse)
    monkeypatch.setattr("ast.literal_eval", parse)
    text = "Is this 'role': {'a': 1} or [{'role': 'user'}]?"
    assert read({"prompt": text, "chosen": "yes", "rejected": "no"}).kind == "text"
    row = {"prompt": [system("s"), user(text)], "chosen": [assistant(text)], "rejected": B}
    assert read(row).kind == "messages"


@pytest.mark.parametrize(
    "content",
    ['{"role": "user", "content": "a"}', '[{"from": "2020", "value": 3}]', '[{"type": "b"}]'],
)
def test_a_content_in_json_may_be_a_question(content):
    row = {"prompt": [user(content)], "chosen": A, "rejected": B}
    assert read(row).values == row
