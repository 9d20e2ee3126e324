"""No message of a prompt is lost, whether a column or both answers or all of them have it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpofast.data.reading.formats import read_pairs
from dpofast.data.reading.row_error import RowError
from tests.data.builders import assistant, system, user

ROLES = ("system", "user", "assistant", "tool")
A, B = [assistant("4")], [assistant("5")]
TURNS = [user("Hi"), assistant("Yes?"), user("2+2?")]


def read(row, **roles):
    (pair,) = read_pairs(row, list(row), roles)
    return pair


def parts(row, **roles):
    values = read(row, **roles).values
    return values["prompt"], values["chosen"], values["rejected"]


def whole(*start):
    return {"chosen": [*start, *A], "rejected": [*start, *B]}


QUOTED = {
    "first question": [user("Hi")],
    "last question": [user("2+2?")],
    "question with blanks around": [user(" 2+2?\n")],
    "all turns": TURNS,
    "two turns in the middle": TURNS[1:],
    "chosen conversation": [*TURNS, *A],
    "rejected conversation": [*TURNS, *B],
}


@pytest.mark.parametrize("column", ["prompt", "messages", "conversations"])
@pytest.mark.parametrize("quoted", QUOTED.values(), ids=QUOTED.keys())
def test_a_prompt_that_quotes_the_conversations_adds_nothing(column, quoted):
    assert parts({column: quoted, **whole(*TURNS)}) == (TURNS, A, B)


SYSTEM = system("Be terse.")
BEFORE = {
    "system": [SYSTEM],
    "system and first question": [SYSTEM, user("Hi")],
    "system and last question": [SYSTEM, user("2+2?")],
    "system and all turns": [SYSTEM, *TURNS],
    "system and chosen conversation": [SYSTEM, *TURNS, *A],
    "developer": [{"role": "developer", "content": "Be terse."}],
}


@pytest.mark.parametrize("column", ["prompt", "messages", "conversations"])
@pytest.mark.parametrize("given", BEFORE.values(), ids=BEFORE.keys())
def test_a_system_message_in_the_prompt_comes_before_the_conversations(column, given):
    assert parts({column: given, **whole(*TURNS)}) == ([given[0], *TURNS], A, B)


def test_earlier_turns_in_the_prompt_come_before_the_conversations():
    early = [SYSTEM, user("Hello"), assistant("Hello!")]
    assert parts({"prompt": [*early, TURNS[0]], **whole(*TURNS)}) == ([*early, *TURNS], A, B)


def test_the_system_message_may_be_in_both():
    given = {"prompt": [SYSTEM, user("2+2?")], **whole(SYSTEM, *TURNS)}
    assert parts(given) == ([SYSTEM, *TURNS], A, B)


def test_steps_that_both_answers_share_stay_in_the_answers():
    steps = [assistant("Let me see."), {"role": "tool", "content": "4"}]
    row = {"prompt": [user("2+2?")], **whole(user("2+2?"), *steps)}
    assert parts(row) == ([user("2+2?")], [*steps, *A], [*steps, *B])


def test_answers_that_begin_as_the_assistant_did_before_are_whole_answers():
    hello = [assistant("Hello!")]
    row = {"prompt": hello, "chosen": [*hello, *A], "rejected": [*hello, *B]}
    assert parts(row) == (hello, row["chosen"], row["rejected"])


@pytest.mark.parametrize("text", ["Hi", "2+2?", "  2+2?\n", "Hi\n\nYes?\n\n2+2?", ""])
def test_a_text_that_quotes_the_conversations_adds_nothing(text):
    assert parts({"prompt": text, **whole(*TURNS)}) == (TURNS, A, B)


@pytest.mark.parametrize("column", ["prompt", "messages", "conversations"])
@pytest.mark.parametrize(
    ("given", "conversations"),
    [
        ([user("Something else")], whole(*TURNS)),
        ([SYSTEM, user("Something else")], whole(*TURNS)),
        ([user("2+2?"), user("Hello")], whole(*TURNS)),
        ([*TURNS, assistant("6")], whole(*TURNS)),
    ],
)
def test_messages_without_a_place_are_refused(column, given, conversations):
    with pytest.raises(RowError, match=rf"^{column} says something that isn't in"):
        read({column: given, **conversations})


def test_a_text_without_a_place_is_refused():
    with pytest.raises(RowError, match=r"prompt says something that isn't in.*remove prompt"):
        read({"prompt": "Be terse.", **whole(*TURNS)})


def test_two_system_messages_are_refused():
    for row in (
        {"prompt": [system("Be rude."), user("2+2?")], **whole(SYSTEM, *TURNS)},
        {"prompt": [system("Be rude.")], **whole(SYSTEM, *TURNS)},
        {"system": "Be rude.", **whole(SYSTEM, *TURNS)},
        {"system": "Be rude.", "prompt": [SYSTEM, user("2+2?")], "chosen": A, "rejected": B},
    ):
        with pytest.raises(RowError, match=r"system message|column system"):
            read(row)


def test_only_one_whole_conversation_is_refused():
    with pytest.raises(RowError, match="only one of them is a whole conversation"):
        read({"prompt": TURNS, "chosen": [*TURNS, *A], "rejected": B})


FIELDS = {
    "user": ([{**user("Hi"), "name": "bob", "documents": "D"}], TURNS),
    "system": ([{**SYSTEM, "tools": "T"}, TURNS[0]], [SYSTEM, *TURNS]),
    "another value": ([{**user("Hi"), "n": True}], [{**user("Hi"), "n": 1}, *TURNS[1:]]),
}


@pytest.mark.parametrize(("quoted", "turns"), FIELDS.values(), ids=FIELDS.keys())
@pytest.mark.parametrize("column", ["prompt", "messages", "conversations"])
def test_a_quoted_message_with_further_fields_is_refused(column, quoted, turns):
    names = ", ".join(name for name in quoted[0] if name not in ("role", "content"))
    with pytest.raises(RowError, match=f"{column} has a message with {names}, which the same"):
        read({column: quoted, **whole(*turns)})
    with_fields = [quoted[0], *turns[1:]]
    assert parts({column: quoted, **whole(*with_fields)}) == (with_fields, A, B)


def test_a_quoted_message_may_have_a_weight():
    assert parts({"prompt": [{**TURNS[0], "loss_weight": 0.0}], **whole(*TURNS)}) == (TURNS, A, B)


def test_a_message_of_an_unknown_speaker_is_not_scored():
    talk = [{"role": "customer", "content": "2+2?"}, {"role": "agent", "content": "4"}]
    other = [talk[0], {"role": "agent", "content": "5"}]
    row = {"prompt": [SYSTEM], "chosen": talk, "rejected": other}
    with pytest.raises(RowError, match=r"roles=\{'customer': 'user', 'agent': 'assistant'\}"):
        read(row)
    mapped = parts(row, customer="user", agent="assistant")
    assert mapped == ([SYSTEM, user("2+2?")], A, B)
    assert parts(row, Customer="user", AGENT="assistant") == mapped, "in upper or lower case"
    single = {"prompt": TURNS, "chosen": talk[1:], "rejected": other[1:]}
    assert parts(single) == (TURNS, talk[1:], other[1:]), "a template may have names of its own"
    thoughts = [[{"role": "thought", "content": text}] for text in ("Add.", "Guess.")]
    row = {"prompt": TURNS, "chosen": thoughts[0] + A, "rejected": thoughts[1] + B}
    assert parts(row) == (TURNS, row["chosen"], row["rejected"])
    with pytest.raises(RowError, match="begins with a message from 'thought'"):
        read({**row, "rejected": thoughts[0] + B})


@pytest.mark.parametrize("prompt", [None, [], "[]", "null"])
def test_a_prompt_that_is_null_or_empty_beside_whole_conversations_is_none(prompt):
    assert parts({"prompt": prompt, **whole(*TURNS)}) == (TURNS, A, B)
    turns = [{"role": "customer", "content": "2+2?"}]
    assert parts({"prompt": prompt, **whole(*turns)}, customer="user") == ([user("2+2?")], A, B)


@pytest.mark.parametrize("write", [list, json.dumps])
def test_lists_that_hold_more_than_messages_are_refused(write):
    for prompt in (None, TURNS, json.dumps(TURNS)):
        for answer in ([5, *A], [*A, 5], ["a", *A]):
            with pytest.raises(RowError, match=r"not a message|is null"):
                read({"prompt": prompt, "chosen": write(answer), "rejected": write(B)})


@pytest.mark.parametrize("prompt", [None, []])
def test_a_prompt_that_is_null_or_empty_leaves_the_other_forms(prompt):
    assert parts({"prompt": prompt, "messages": TURNS, "chosen": A, "rejected": B}) == (TURNS, A, B)
    row = {"prompt": prompt, "instruction": "2+2?", "chosen": "4", "rejected": "5"}
    assert parts(row) == ([user("2+2?")], A, B)
    with pytest.raises(RowError, match=r"prompt is null|prompt has no messages"):
        read({"prompt": prompt, "chosen": A, "rejected": B})


FORMS = {
    "prompt": {"prompt": TURNS, "chosen": A, "rejected": B},
    "prompt repeated": {"prompt": TURNS, **whole(*TURNS)},
    "prompt quoted": {"prompt": "2+2?", **whole(*TURNS)},
    "messages": {"messages": TURNS, "chosen": A[0], "rejected": B[0]},
    "conversations": {"conversations": TURNS, "chosen": "4", "rejected": "5"},
    "implicit": whole(*TURNS),
    "instruction": {
        "instruction": "2+2?",
        "history": [["Hi", "Yes?"]],
        "chosen": "4",
        "rejected": "5",
    },
    "chosen_messages": {f"{k}_messages": v for k, v in whole(*TURNS).items()},
    "rejected_response": {"messages": [*TURNS, *A], "rejected_response": "5"},
    "OpenAI": {"input": {"messages": TURNS}, "preferred_output": A, "non_preferred_output": B},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_a_column_system_is_used_in_every_form(form):
    pair = read({**form, "system": "Be terse."})
    assert pair.values["prompt"] == [SYSTEM, *TURNS]
    assert "system" in pair.used
    for absent in (None, "", " "):
        assert parts({**form, "system": absent}) == (TURNS, A, B)
    with pytest.raises(RowError, match="system is not text"):
        read({**form, "system": 4})


def test_a_column_system_may_repeat_the_system_message():
    row = {"system": "Be terse.", "prompt": [SYSTEM, *TURNS], "chosen": A, "rejected": B}
    assert parts(row) == ([SYSTEM, *TURNS], A, B)


@pytest.mark.parametrize(
    "weight", [{"weight": 0}, {"loss_weight": 0.5}, {"loss": False}, {"training": False}]
)
def test_a_message_of_an_answer_that_shall_not_count_is_refused(weight):
    (name,) = weight
    answer = [{**assistant("Let me see."), **weight}, assistant("4")]
    with pytest.raises(RowError, match=rf"chosen\[0\] has {name}"):
        read({"prompt": TURNS, "chosen": answer, "rejected": B})


def test_weights_that_change_nothing_are_read_over():
    prompt = [{**message, "loss_weight": 0.0} for message in TURNS]
    answer = [{**assistant("4"), "loss_weight": 1.0, "loss": True, "weight": None}]
    assert parts({"prompt": prompt, "chosen": answer, "rejected": B}) == (prompt, answer, B)


EMPTY = (
    *([], [assistant("")], assistant(" "), None, {}, [{}], [None]),
    *([assistant(None)], {"role": "assistant"}, {"from": "gpt", "value": None}),
    [{**assistant(None), "reasoning_content": " ", "tool_calls": []}],
)


@pytest.mark.parametrize("empty", ["", " \n", *EMPTY])
@pytest.mark.parametrize("start", [{"prompt": TURNS}, {"messages": TURNS}, {"prompt": "2+2?"}])
def test_an_empty_answer_is_named_and_no_error(start, empty):
    assert read({**start, "chosen": A, "rejected": B}).blank is None
    assert read({**start, "chosen": A, "rejected": empty}).blank == "rejected"
    assert read({**start, "chosen": empty, "rejected": B}).blank == "chosen"


def test_an_answer_that_only_calls_a_tool_is_not_empty():
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]}
    assert read({"prompt": TURNS, "chosen": call, "rejected": B}).blank is None


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking", "refusal"])
@pytest.mark.parametrize("content", ["", None])
def test_an_answer_that_only_thinks_or_refuses_is_not_empty(field, content):
    answer = {**assistant(content), field: "because"}
    pair = read({"prompt": TURNS, "chosen": answer, "rejected": B})
    assert (pair.blank, pair.values["chosen"]) == (None, [answer])


def test_a_message_without_content_inside_an_answer_is_refused():
    with pytest.raises(RowError, match=r"content of chosen\[1\] is null"):
        read({"prompt": TURNS, "chosen": [*A, assistant(None)], "rejected": B})


def test_an_empty_last_message_of_whole_conversations_is_an_empty_answer():
    for content in ("", None):
        pair = read({"chosen": [*TURNS, assistant(content)], "rejected": [*TURNS, *B]})
        assert (pair.blank, pair.values["prompt"]) == ("chosen", TURNS)


says = st.sampled_from(["a", "b", "c", "a b"])
turn = st.builds(lambda role, text: {"role": role, "content": text}, st.sampled_from(ROLES), says)
turns = st.lists(turn, max_size=4)
rows = st.fixed_dictionaries(
    {"chosen": turns, "rejected": turns},
    optional={
        "prompt": st.one_of(says, turns.filter(bool)),
        "messages": turns.filter(bool),
        "system": st.one_of(st.none(), says),
    },
)


@st.composite
def whole_rows(draw):
    """Whole conversations beside a prompt with something of theirs and something else."""
    start = [*draw(st.lists(turn, max_size=1)), user("a"), *draw(turns)]
    first, last = sorted(draw(st.tuples(*[st.integers(0, len(start))] * 2)))
    prompt = [*draw(st.lists(turn, max_size=2)), *start[first:last]] or [system("c")]
    text = "\n".join(message["content"] for message in prompt)
    row = whole(*start) | {draw(st.sampled_from(["prompt", "messages"])): prompt}
    return row | draw(st.sampled_from([{}, {"prompt": text}, {"system": "c"}]))


def told(messages):
    return [(message["role"], message["content"]) for message in messages]


@settings(deadline=None, max_examples=400)
@given(st.one_of(rows, whole_rows()))
def test_every_message_is_used_or_refused(row):
    try:
        pair = read(row)
    except RowError:
        return
    if pair.blank:
        return
    prompt, chosen, rejected = (told(pair.values[c]) for c in ("prompt", "chosen", "rejected"))
    for column, answer in (("chosen", chosen), ("rejected", rejected)):
        pairs = told(row[column])
        assert pairs == (prompt + answer)[-len(pairs) :], "each conversation is there as it was"
    for column in pair.used & {"prompt", "messages"} & set(row):
        if isinstance(row[column], str):
            said = "".join(text for _, text in prompt)
            assert "".join(row[column].split()) in "".join(said.split())
        else:
            assert set(told(row[column])) <= set(prompt + chosen + rejected)
    if row.get("system"):
        assert prompt[0] == ("system", row["system"])
    normal = {column: pair.values[column] for column in ("prompt", "chosen", "rejected")}
    assert read(normal).values == normal, "the pair reads as itself"
