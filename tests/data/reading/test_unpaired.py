"""Unpaired rows of every form become prompt, completion and label."""

from __future__ import annotations

import datasets
import numpy as np
import pytest

from dpofast.data import hold_out, load_preferences, load_unpaired, mix_preferences, rows_by_source
from dpofast.data.reading.messages import decode_messages
from dpofast.data.reading.normal_form import source_notes
from dpofast.errors import ConfigError, DataError
from tests.data.builders import assistant, system, user, write_rows

TEXT = {"prompt": "a", "completion": "b", "label": True}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
TOOL = {"role": "tool", "content": "4"}
FORMS = {
    "text": (TEXT, "a", "b"),
    "messages": (
        {"prompt": [user("a")], "completion": [assistant("b")], "label": True},
        [user("a")],
        [assistant("b")],
    ),
    "a text answer to messages": (
        {"prompt": [user("a")], "completion": "b", "label": True},
        [user("a")],
        [assistant("b")],
    ),
    "one message": (
        {"prompt": user("a"), "completion": assistant("b"), "label": True},
        [user("a")],
        [assistant("b")],
    ),
    "json": (
        {"prompt": '[{"role": "user", "content": "a"}]', "completion": "b", "label": "true"},
        [user("a")],
        [assistant("b")],
    ),
    "the completion is the whole conversation": (
        {"prompt": "a", "completion": [user("a"), assistant("b")], "label": True},
        [user("a")],
        [assistant("b")],
    ),
    "implicit prompt": (
        {"messages": [user("a"), assistant("b"), user("c"), assistant("d")], "label": True},
        [user("a"), assistant("b"), user("c")],
        [assistant("d")],
    ),
    "calls belong to the prompt": (
        {"messages": [user("a"), CALL, TOOL, assistant("d")], "label": True},
        [user("a"), CALL, TOOL],
        [assistant("d")],
    ),
    "a completion of calls": (
        {"prompt": [user("a")], "completion": [CALL, TOOL, assistant("d")], "label": True},
        [user("a")],
        [CALL, TOOL, assistant("d")],
    ),
    "thoughts in a role of their own": (
        {
            "prompt": [user("a")],
            "completion": [{"role": "thinker", "content": "t"}, assistant("b")],
            "label": True,
        },
        [user("a")],
        [{"role": "thinker", "content": "t"}, assistant("b")],
    ),
    "messages and a completion": (
        {"messages": [user("a")], "completion": assistant("b"), "label": True},
        [user("a")],
        [assistant("b")],
    ),
    "sharegpt": (
        {
            "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
            "kto_tag": True,
            "system": "s",
        },
        [system("s"), user("a")],
        [assistant("b")],
    ),
    "alpaca": (
        {"instruction": "a", "input": "i", "output": "b", "kto_tag": True},
        [user("a\ni")],
        [assistant("b")],
    ),
}


def parts(rows):
    return [
        decode_messages(value) if isinstance(value, list) else value
        for value in (rows[0]["prompt"], rows[0]["completion"])
    ]


@pytest.mark.parametrize(("row", "prompt", "completion"), FORMS.values(), ids=FORMS.keys())
def test_forms(row, prompt, completion):
    rows = load_unpaired([row])
    assert parts(rows) == [prompt, completion]
    assert rows["label"][:] == [True]
    assert source_notes(rows).unused_columns == ()
    # Read again: roles keep the source from being passed on as it is.
    again = load_unpaired(rows, roles={"nobody": "user"})
    assert again.to_list() == rows.to_list()
    assert load_unpaired(rows) is rows


@pytest.mark.parametrize("row", [FORMS["alpaca"][0], FORMS["messages"][0], TEXT])
def test_a_pair_of_the_same_answer_reads_the_same(row):
    names = {"completion": "chosen", "output": "chosen"}
    pair = {names.get(c, c): v for c, v in row.items() if c not in ("label", "kto_tag")}
    pair["rejected"] = pair["chosen"]
    (read,), (expected,) = load_unpaired([row]), load_preferences([pair])
    assert read.pop("label") is True
    assert read == {
        "completion" if c == "chosen" else c: v for c, v in expected.items() if c != "rejected"
    }


def test_ids():
    rows = load_unpaired([{"prompt_ids": [1, 2], "completion_ids": [3], "label": 0}])
    assert rows.to_list() == [
        {"row": 0, "prompt_ids": [1, 2], "completion_ids": [3], "label": False}
    ]


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        *((value, True) for value in (True, 1, 1.0, "true", "True", " 1 ", np.bool_(True))),
        *((value, False) for value in (False, 0, 0.0, "false", "FALSE", "0", np.int64(0))),
    ],
)
def test_labels(label, expected):
    assert load_unpaired([{**TEXT, "label": label}])["label"][:] == [expected]


@pytest.mark.parametrize("label", [2, -1, 0.5, "yes", "", [True], {"a": 1}, float("nan")])
def test_other_labels_are_refused(label):
    with pytest.raises(DataError, match=r"row 0 .*label is .*expected true for a desirable"):
        load_unpaired([{**TEXT, "label": label}])


BAD_ROWS = {
    "null label": ({**TEXT, "label": None}, "label is null"),
    "no label": ({"prompt": "a", "completion": "b"}, "no column 'label' (found: prompt, compl"),
    "two labels": ({**TEXT, "kto_tag": False}, "label and kto_tag contradict each other"),
    "no completion": (
        {"prompt": "a", "response": "b", "label": True},
        "columns={'completion': 'response'}",
    ),
    "number": ({**TEXT, "completion": 4}, "completion is not text but int 4"),
    "no prompt": ({"completion": "b", "label": True}, "completion is a text without a prompt"),
    "no question": ({"messages": [assistant("b")], "label": True}, "messages has an answer but no"),
    "no answer": (
        {"messages": [user("a"), assistant("b"), user("c")], "label": True},
        "messages ends with a message from 'user'",
    ),
    "only a question": ({"messages": [user("a")], "label": True}, "no message from the assistant"),
    "another prompt": (
        {"prompt": "x", "completion": [user("a"), assistant("b")], "label": True},
        "isn't in the conversation of completion",
    ),
    "image": ({**TEXT, "image": "i.png"}, "image holds str"),
    "bad id": ({"prompt_ids": [1], "completion_ids": [-1], "label": True}, "completion_ids holds"),
    "weight": (
        {"prompt": [user("a")], "completion": [{**assistant("b"), "weight": 0}], "label": True},
        "completion[0] has weight 0",
    ),
}


@pytest.mark.parametrize(("row", "text"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_row_that_cannot_be_used_is_named(row, text):
    with pytest.raises(DataError) as caught:
        load_unpaired([row], name="rows")
    message = str(caught.value)
    assert message.startswith("rows, row 0 (counted from 0): ")
    assert text in message
    assert "\n" not in message


def test_bad_rows_are_skipped_on_request():
    rows = load_unpaired([TEXT, {**TEXT, "label": "?"}], skip_bad_rows=True, name="rows")
    assert rows["label"][:] == [True, None]
    assert rows["left_out"][:] == [None, "bad row"]
    assert "rows, row 1 (counted from 0): label is '?'" in rows["problem"][1]


@pytest.mark.parametrize("empty", [None, "", " "])
def test_an_empty_answer_is_left_out(empty):
    rows = load_unpaired([TEXT, {**TEXT, "completion": empty}])
    assert rows["left_out"][:] == [None, "empty answer"]
    with pytest.raises(DataError, match="completion is an empty answer"):
        load_unpaired([TEXT, {**TEXT, "completion": " "}], strict=True)


def test_columns_and_roles_are_mapped():
    row = {"q": [{"from": "oracle", "value": "a"}], "a": "b", "good": "1"}
    columns = {"prompt": "q", "completion": "a", "label": "good"}
    rows = load_unpaired([row], columns=columns, roles={"oracle": "user"})
    assert parts(rows) == [[user("a")], [assistant("b")]]
    with pytest.raises(ConfigError, match="did you mean 'completion'"):
        load_unpaired([row], columns={"completon": "a"})


def test_what_every_row_can_have():
    row = {"prompt": [user("a")], "completion": "b", "label": True, "tools": [{"name": "f"}]}
    rows = load_unpaired([{**row, "chat_template_kwargs": {"x": 1}, "score": 3, "row": 7}])
    assert (rows["tools"][0], rows["chat_template_kwargs"][0]) == ('[{"name": "f"}]', '{"x": 1}')
    assert rows["row"][:] == [7]
    assert source_notes(rows).unused_columns == ("score",)


def test_weights_are_read_and_confidences_are_not():
    rows = load_unpaired([{**TEXT, "weight": 2, "label_confidence": 0.9}])
    assert rows["weight"][:] == [2.0]
    assert "label_confidence" not in rows.column_names
    assert source_notes(rows).unused_columns == ("label_confidence",)
    with pytest.raises(DataError, match="weight is -1"):
        load_unpaired([{**TEXT, "weight": -1}])


@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet", "arrow", "csv"])
def test_every_kind_of_file(tmp_path, ending):
    path = write_rows(tmp_path / f"rows.{ending}", [TEXT, {**TEXT, "label": False}])
    assert load_unpaired(path).to_list() == [
        {"row": 0, **TEXT},
        {"row": 1, **TEXT, "label": False},
    ]


def test_mixtures_and_held_out_rows():
    sets = {
        name: load_unpaired([{**TEXT, "prompt": f"{name} {i}", "label": i % 2} for i in range(20)])
        for name in ("one", "two")
    }
    mixture = mix_preferences(sets, {"one": 1, "two": 1})
    assert rows_by_source(mixture) == {"one": 20, "two": 20}
    training, held = hold_out(mixture, 0.25)
    assert (len(training), len(held)) == (30, 10)
    assert not set(training["prompt"][:]) & set(held["prompt"][:])
    assert isinstance(held, datasets.Dataset)
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(DataError, match=r"three holds pairs and one unpaired rows.*split_pairs"):
        mix_preferences({**sets, "three": [pair]})
