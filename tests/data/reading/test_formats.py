"""Every format becomes the normal form, or an error that names the row."""

from __future__ import annotations

import json

import datasets
import pytest

from dpofast.data import load_preferences
from dpofast.errors import ConfigError, DataError
from tests.data.builders import assistant, plain_rows, system, user

TEXT = {"prompt": "2+2=", "chosen": "4", "rejected": "5"}
MESSAGES = {
    "prompt": [user("2+2?")],
    "chosen": [assistant("4")],
    "rejected": [assistant("5")],
}


def load_one(row, **options):
    """The normal form of one row, without its index."""
    (loaded,) = plain_rows(load_preferences([row], **options))
    assert loaded.pop("row") == 0
    return loaded


def test_text_columns_stay_as_they_are():
    assert load_one({**TEXT, "score": 0.5}) == TEXT


def test_message_columns_stay_as_they_are():
    assert load_one(MESSAGES) == MESSAGES


def test_answers_may_be_one_message_or_a_text():
    row = {"prompt": [user("2+2?")], "chosen": assistant("4"), "rejected": "5"}
    assert load_one(row) == MESSAGES


def test_an_answer_may_have_several_messages():
    turns = [assistant("Let me see."), {"role": "tool", "content": "4"}, assistant("4")]
    assert load_one({**MESSAGES, "chosen": turns})["chosen"] == turns


def test_text_prompt_with_answers_as_messages():
    assert load_one({**MESSAGES, "prompt": "2+2?"}) == MESSAGES


@pytest.mark.parametrize("prompt", [None, "2+2?", [user("2+2?")]])
def test_answers_that_repeat_the_conversation(prompt):
    row = {c: [user("2+2?"), *MESSAGES[c]] for c in ("chosen", "rejected")}
    assert load_one(row if prompt is None else {"prompt": prompt, **row}) == MESSAGES


def test_a_copy_of_the_chosen_conversation_beside_the_pair_is_not_a_prompt():
    whole = {c: [user("2+2?"), *MESSAGES[c]] for c in ("chosen", "rejected")}
    assert load_one({"messages": whole["chosen"], **whole}) == MESSAGES
    assert load_one({"prompt": "2+2?", "messages": whole["chosen"], **whole}) == MESSAGES


def test_messages_with_answer_objects():
    row = {"messages": [user("2+2?")], "chosen": assistant("4"), "rejected": assistant("5")}
    assert load_one(row) == MESSAGES


def test_sharegpt_conversations():
    row = {
        "conversations": [
            {"from": "system", "value": "Be short."},
            {"from": "human", "value": "2+2?"},
            {"from": "gpt", "value": "4"},
            {"from": "observation", "value": "sunny"},
        ],
        "chosen": {"from": "gpt", "value": "4"},
        "rejected": {"from": "gpt", "value": "5"},
    }
    loaded = load_one(row)
    roles = [message["role"] for message in loaded["prompt"]]
    assert roles == ["system", "user", "assistant", "tool"]
    assert loaded["chosen"] == [assistant("4")]


def test_instruction_and_input_are_one_user_message():
    row = {"instruction": "Add.", "input": "2 and 2", "output": "4", "chosen": "4", "rejected": "5"}
    loaded = load_one(row)
    assert loaded.pop("plain_prompt") == (
        "### Instruction:\nAdd.\n\n### Input:\n2 and 2\n\n### Response:\n"
    )
    assert loaded == {**MESSAGES, "prompt": [user("Add.\n2 and 2")]}


@pytest.mark.parametrize("given", ["", None])
def test_instruction_without_input(given):
    row = {"instruction": "Add 2 and 2.", "input": given, "chosen": "4", "rejected": "5"}
    loaded = load_one(row)
    assert loaded["prompt"] == [user("Add 2 and 2.")]
    assert loaded["plain_prompt"] == "### Instruction:\nAdd 2 and 2.\n\n### Response:\n"


def test_instruction_with_system_and_history():
    row = {
        "instruction": "And 3?",
        "system": "Be short.",
        "history": [["2+2?", "4"]],
        "chosen": "6",
        "rejected": "7",
    }
    loaded = load_one(row)
    assert loaded["prompt"] == [system("Be short."), user("2+2?"), assistant("4"), user("And 3?")]
    assert "plain_prompt" not in loaded


def test_history_as_json_text():
    row = {"instruction": "And 3?", "chosen": "6", "rejected": "7"}
    history = [["2+2?", "4"]]
    loaded = load_one({**row, "history": json.dumps(history)})
    assert loaded == load_one({**row, "history": history})
    assert load_one({**row, "history": ""}) == load_one(row)
    with pytest.raises(DataError, match="history is not a list of"):
        load_one({**row, "history": "2+2? 4"})


def test_token_ids_and_reference_log_probs():
    row = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]}
    logps = {"ref_chosen_logps": -1.5, "ref_rejected_logps": -2}
    assert load_one({**row, **logps}) == {**row, **logps}


def test_tools_and_template_options_are_kept_as_json():
    row = {**MESSAGES, "tools": [{"name": "add"}], "chat_template_kwargs": {"think": False}}
    loaded = load_one(row)
    assert json.loads(loaded["tools"]) == [{"name": "add"}]
    assert json.loads(loaded["chat_template_kwargs"]) == {"think": False}
    assert load_one({**row, "tools": json.dumps(row["tools"])}) == loaded


def test_tool_calls_survive_rows_with_other_arguments():
    def call(arguments):
        return {"role": "assistant", "tool_calls": [{"function": {"arguments": arguments}}]}

    rows = [{**MESSAGES, "chosen": [call(a)]} for a in ({"x": 1}, {"y": "two"})]
    loaded = plain_rows(load_preferences(datasets.Dataset.from_list(rows)))
    assert [row["chosen"] for row in loaded] == [row["chosen"] for row in rows]


def test_columns_and_roles_can_be_mapped():
    row = {"question": [{"from": "oracle", "value": "2+2?"}], "good": "4", "bad": "5"}
    columns = {"conversations": "question", "chosen": "good", "rejected": "bad"}
    assert load_one(row, columns=columns, roles={"oracle": "user"}) == MESSAGES


def test_columns_can_be_swapped():
    swapped = load_one(TEXT, columns={"chosen": "rejected", "rejected": "chosen"})
    assert swapped == {"prompt": "2+2=", "chosen": "5", "rejected": "4"}


def test_the_normal_form_is_read_again_as_itself():
    rows = [
        {**MESSAGES, "tools": [{"name": "add"}]},
        {**MESSAGES, "chosen": [{**assistant("4"), "name": "a"}]},
    ]
    once = load_preferences(rows)
    assert load_preferences(once) is once
    assert load_preferences(once.to_list()).to_list() == once.to_list()
    part = load_preferences(once.select([1]).to_list())
    assert part["row"] == [1], "a part of the data keeps the rows of the source"


ANSWERS = {"chosen": "4", "rejected": "5"}
BAD_ROWS = {
    "missing rejected": ({"prompt": "a", "chosen": "b", "rejectd": "c"}, "'rejectd'"),
    "no columns": ({}, "no column 'chosen'"),
    "null prompt": ({**TEXT, "prompt": None}, "prompt is null"),
    "number": ({**TEXT, "chosen": 4}, "chosen is not text but int 4"),
    "bytes": ({**TEXT, "prompt": b"x"}, "prompt is not text but bytes"),
    "surrogate": ({**TEXT, "chosen": "\ud800"}, "surrogate"),
    "list role": ({**MESSAGES, "prompt": [{"role": [1], "content": "a"}]}, "role of prompt[0]"),
    "no role": ({**MESSAGES, "prompt": [{"content": "a"}]}, "prompt[0] has neither role nor from"),
    "unknown from": (
        {"conversations": [{"from": "moon", "value": "a"}], "chosen": "b", "rejected": "c"},
        "roles={'moon': 'user'}",
    ),
    "null content": ({**MESSAGES, "prompt": [user(None)]}, "content of prompt[0]"),
    "no messages": ({**MESSAGES, "prompt": []}, "prompt has no messages"),
    "strings as messages": ({**MESSAGES, "prompt": ["a"]}, "prompt[0] is not a message"),
    "image": ({**MESSAGES, "prompt": [user([{"type": "image"}])]}, "block of type 'image'"),
    "thought": ({**MESSAGES, "prompt": [user([{"type": "thinking"}])]}, "reasoning_content"),
    "plain text in a list": ({**MESSAGES, "prompt": [user(["a"])]}, "a list with str 'a'"),
    "two texts in a block": (
        {**MESSAGES, "prompt": [user([{"type": "text", "text": "a", "value": "b"}])]},
        "with text 'a' and value 'b'; keep one",
    ),
    "two texts in a message": (
        {"conversations": [{"from": "human", "value": "q", "content": "I"}], **ANSWERS},
        "value 'q' and content 'I'; keep one",
    ),
    "nothing in common": ({"chosen": "abc", "rejected": "xyz"}, "begin differently"),
    "implicit number": ({"chosen": 1, "rejected": 2}, "chosen is not text"),
    "empty instruction": ({"instruction": " ", "chosen": "a", "rejected": "b"}, "both empty"),
    "bad history": ({"instruction": "a", "history": ["x"], "chosen": "b", "rejected": "c"}, "hist"),
    "half a reference": ({**TEXT, "ref_chosen_logps": -1.0}, "no ref_rejected_logps"),
    "nan reference": (
        {**TEXT, "ref_chosen_logps": -1.0, "ref_rejected_logps": float("nan")},
        "ref_rejected_logps is nan",
    ),
    "negative id": ({"prompt_ids": [1], "chosen_ids": [-1], "rejected_ids": [2]}, "chosen_ids"),
    "float id": ({"prompt_ids": [1], "chosen_ids": [1.5], "rejected_ids": [2]}, "chosen_ids"),
    "no ids": ({"prompt_ids": [], "chosen_ids": [1], "rejected_ids": [2]}, "prompt_ids is empty"),
    "broken tools": ({**MESSAGES, "tools": "{"}, "tools is not plain JSON"),
    "tools object": ({**MESSAGES, "tools": {"a": 1}}, "tools is not a list"),
    "reserved": ({**MESSAGES, "chat_template_kwargs": {"tokenize": True}}, "sets tokenize"),
}


@pytest.mark.parametrize(("row", "text"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_row_that_cannot_be_used_is_named(row, text):
    with pytest.raises(DataError) as caught:
        load_preferences([row], name="pairs")
    message = str(caught.value)
    assert message.startswith("pairs, row 0 (counted from 0): ")
    assert text in message
    assert "\n" not in message


def test_the_wrong_row_is_the_one_that_is_named():
    rows = [TEXT] * 17 + [{**TEXT, "chosen": 4}]
    with pytest.raises(DataError, match=r"pairs, row 17 \(counted from 0\): chosen is not text"):
        load_preferences(rows, name="pairs")


def test_rows_of_two_forms_are_refused():
    with pytest.raises(DataError, match=r"row 1 .*rows around it are text"):
        load_preferences([TEXT, MESSAGES])


def test_a_prompt_that_is_missing_later_is_no_implicit_prompt():
    with pytest.raises(DataError, match="row 1 "):
        load_preferences([TEXT, {"chosen": "a b", "rejected": "a c"}])


def test_identical_answers_are_refused_only_under_strict():
    rows = [TEXT, {**TEXT, "rejected": "4"}]
    assert len(load_preferences(rows)) == 2
    with pytest.raises(DataError, match=r"row 1 .*identical"):
        load_preferences(rows, strict=True)
    with pytest.raises(DataError, match=r"row 1 .*identical"):
        load_preferences(load_preferences(rows), strict=True)


def test_answers_that_only_python_takes_for_equal_are_not_identical():
    def answer(*arguments):
        return {**assistant(""), "tool_calls": [{"function": dict(arguments)}]}

    one = answer(("a", 1), ("b", 2))
    for other in (answer(("b", 2), ("a", 1)), answer(("a", True), ("b", 2)), answer(("a", 1.0))):
        load_preferences([{**MESSAGES, "chosen": one, "rejected": other}], strict=True)
    with pytest.raises(DataError, match="identical"):
        load_preferences([{**MESSAGES, "chosen": one, "rejected": [dict(one)]}], strict=True)


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({"promt": "question"}, "did you mean 'prompt'"),
        ({"chosen_answer": "good"}, "'chosen_answer', which no format has; known are prompt"),
        ({"reward": "score"}, "which no format has; known are prompt"),
        ({"question": "prompt"}, "the other way round"),
    ],
)
def test_a_wrong_mapping_is_refused(columns, text):
    with pytest.raises(ConfigError, match=text):
        load_preferences([TEXT], columns=columns)


@pytest.mark.parametrize(
    ("found", "example"),
    [
        ("chosen_answer", "chosen_answer"),
        ("answer_chosen", "answer_chosen"),
        ("Chosen", "Chosen"),
        ("chsoen", "chsoen"),
        ("chosen_reward", "your_column"),
        ("chosen_score", "your_column"),
        ("chosen_model", "your_column"),
        ("chosen_response_length", "your_column"),
        ("choices", "your_column"),
    ],
)
def test_the_column_of_an_answer_is_named_only_if_it_holds_answers(found, example):
    with pytest.raises(DataError, match=rf"columns=\{{'chosen': '{example}'\}}"):
        load_preferences([{"prompt": "a", found: "b", "rejected": "c"}])


def test_a_mapping_to_a_column_that_is_not_there():
    with pytest.raises(DataError, match=r"no column 'question'.*found: prompt, chosen, rejected"):
        load_preferences([TEXT], columns={"prompt": "question"})
