"""Rows as other tools write them."""

from __future__ import annotations

import json

import pytest

from dpofast.data.reading.formats import COLUMNS, read_pairs
from dpofast.data.reading.row_error import RowError
from tests.data.builders import assistant, system, user

PROMPT, A, B = [system("Be terse."), user("2+2?")], [assistant("4")], [assistant("5")]
TOOLS = [{"type": "function", "function": {"name": "add"}}]


def read(row, **roles):
    (pair,) = read_pairs(row, list(row), roles)
    assert pair.used <= set(COLUMNS)
    return pair


def parts(pair):
    return pair.values["prompt"], pair.values["chosen"], pair.values["rejected"]


def openai(**given):
    return {
        "input": {"messages": PROMPT, "parallel_tool_calls": True, **given},
        "preferred_output": A,
        "non_preferred_output": B,
    }


def test_openai():
    pair = read(openai(tools=TOOLS))
    assert parts(pair) == (PROMPT, A, B)
    assert json.loads(pair.values["tools"]) == TOOLS
    assert pair.columns == "input, preferred_output, non_preferred_output"
    assert pair.used >= {"input", "preferred_output", "non_preferred_output"}
    assert "messages" not in pair.used, "no column of the source"


@pytest.mark.parametrize("write", [json.dumps, dict])
def test_openai_with_an_empty_list_of_tools(write):
    column = read({"prompt": PROMPT, "chosen": A, "rejected": B, "tools": []})
    given = openai(tools=[])
    given["input"] = write(given["input"])
    assert read(given).values["tools"] == column.values["tools"] == "[]"
    with pytest.raises(RowError, match="give them once"):
        read({**openai(tools=[]), "tools": TOOLS})


def test_openai_as_json_text():
    row = {column: json.dumps(value) for column, value in openai(tools=TOOLS).items()}
    assert read(row).values == read(openai(tools=TOOLS)).values


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({**openai(), "input": "2+2?"}, "input is not an object with messages"),
        ({**openai(), "input": None}, "input is not an object with messages"),
        ({**openai(), "input": {"tools": TOOLS}}, "input is not an object with messages"),
        (openai(functions=TOOLS), "input has functions"),
        ({**openai(tools=TOOLS), "tools": TOOLS}, "give them once"),
        ({**openai(), "preferred_output": [{"content": "4"}]}, "preferred_output[0]"),
        (openai(messages=[]), "input.messages has no messages"),
    ],
)
def test_broken_openai(row, text):
    with pytest.raises(RowError) as caught:
        read(row)
    assert text in str(caught.value)


@pytest.mark.parametrize("column", ["messages", "conversations"])
@pytest.mark.parametrize("rejected", ["5", B, B[0]])
def test_swift_rejected_response(column, rejected):
    pair = read({column: [*PROMPT, *A], "rejected_response": rejected})
    assert parts(pair) == (PROMPT, A, B)
    assert pair.columns == f"{column}, rejected_response"
    assert pair.used >= {column, "rejected_response"}


def test_swift_rejected_response_after_a_tool_call():
    steps = [{"role": "assistant", "tool_calls": TOOLS}, {"role": "tool", "content": "4"}, *A]
    assert parts(read({"messages": [*PROMPT, *steps], "rejected_response": "5"})) == (
        PROMPT,
        steps,
        B,
    )


def test_swift_rejected_response_with_roles_of_a_file():
    turns = [{"role": "asker", "content": "2+2?"}, {"role": "expert", "content": "4"}]
    row = {"messages": turns, "rejected_response": "5"}
    assert parts(read(row, asker="user", expert="assistant")) == ([user("2+2?")], A, B)


def test_swift_rejected_messages():
    pair = read({"messages": [*PROMPT, *A], "rejected_messages": [*PROMPT, *B]})
    assert parts(pair) == (PROMPT, A, B)
    assert pair.columns == "messages, rejected_messages"


@pytest.mark.parametrize("messages", [PROMPT, [], A, "x"])
def test_swift_without_an_answer(messages):
    with pytest.raises(RowError, match="messages doesn't end with an answer to the user"):
        read({"messages": messages, "rejected_response": "5"})


def test_broken_answer_of_swift():
    with pytest.raises(RowError, match=r"content of messages\[2:\]\[0\] is null"):
        read({"messages": [*PROMPT, assistant(None), *A], "rejected_response": "5"})
    with pytest.raises(RowError, match=r"rejected_response\[0\] has neither role nor from"):
        read({"messages": [*PROMPT, *A], "rejected_response": [{"content": "5"}]})


def test_swift_printed_by_python():
    with pytest.raises(RowError, match="messages is messages as Python prints them"):
        read({"messages": str([*PROMPT, *A]), "rejected_response": "5"})


def test_llama_factory_messages_with_value_blocks():
    def block(role, text, weight):
        content = [{"type": "text", "value": text}]
        return {"role": role, "content": content, "loss_weight": weight}

    def text(role, text, weight):
        content = [{"type": "text", "text": text}]
        return {"role": role, "content": content, "loss_weight": weight}

    row = {
        "chosen_messages": [block("user", "2+2?", 0.0), block("assistant", "4", 1.0)],
        "rejected_messages": [block("user", "2+2?", 0.0), block("assistant", "5", 1.0)],
    }
    pair = read(row)
    assert parts(pair) == (
        [text("user", "2+2?", 0.0)],
        [text("assistant", "4", 1.0)],
        [text("assistant", "5", 1.0)],
    )
    row["chosen_messages"][0]["content"][0]["type"] = "image_url"
    with pytest.raises(RowError, match=r"chosen_messages\[0\] has a block of type 'image_url'"):
        read(row)


@pytest.mark.parametrize("names", [("chosen", "rejected"), ("preferred", "non_preferred")])
def test_a_null_answer_is_empty_under_every_name(names):
    row = openai() if "preferred" in names else {"prompt": "2+2=", "chosen_response": "4"}
    row |= {"non_preferred_output": None} if "preferred" in names else {"rejected_response": None}
    assert read(row).blank == "rejected"
    assert read({"messages": [*PROMPT, *A], "rejected_response": None}).blank == "rejected"


def test_columns_of_arrow_that_are_null_in_a_row_do_not_hide_another_form():
    row = {"messages": [*PROMPT, *A], "rejected_response": "5", "rejected_messages": None}
    row |= dict.fromkeys(("chosen", "rejected", "chosen_response", "rejected_conversations"))
    assert parts(read(row)) == (PROMPT, A, B)


def test_torchtune_conversations():
    row = {"chosen_conversations": [*PROMPT, *A], "rejected_conversations": [*PROMPT, *B]}
    assert parts(read(row)) == (PROMPT, A, B)


@pytest.mark.parametrize(
    ("prompt", "kind"), [({"prompt": "2+2="}, "text"), ({"instruction": "2+2?"}, "messages")]
)
def test_chosen_and_rejected_response(prompt, kind):
    row = {**prompt, "chosen_response": "4", "rejected_response": "5", "chosen_score": 1.0}
    pair = read(row)
    assert pair.kind == kind
    assert pair.values["rejected"] == ("5" if kind == "text" else B)
    assert pair.used >= {"chosen_response", "rejected_response"}
    assert "chosen_score" not in pair.used
    with pytest.raises(RowError, match="chosen_response is not text"):
        read({"prompt": "2+2=", "chosen_response": 4, "rejected_response": "5"})


def test_columns_of_another_form_beside_a_pair_are_unused():
    row = {"prompt": "2+2=", "chosen": "4", "rejected": "5", "messages": PROMPT, "output": "4"}
    row |= {"chosen_response": "6", "label": True, "score": 0.5, "instruction": "Add."}
    assert read(row).used & set(row) == {"prompt", "chosen", "rejected"}
