"""The end of the prompt in texts and conversations without a prompt column."""

from __future__ import annotations

import pytest

from dpofast.data.reading.implicit import split_messages, split_texts
from dpofast.data.reading.row_error import RowError
from tests.data.builders import assistant, system, user

RENDERED = {
    "hh": ("\n\nHuman: Hi\n\nAssistant:", " Hello.", " How are you?"),
    "hh, same first letters": ("\n\nHuman: Hi\n\nAssistant:", " Hello.", " Help."),
    "hh, two turns": ("\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: 2+2\n\nAssistant:", " 4", " 5"),
    "chatml": ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Yes", "Yep"),
    "llama 3": ("<|start_header_id|>assistant<|end_header_id|>\n\n", "The cat", "The car"),
    "mistral": ("<s>[INST] Hi [/INST]", " One", " Once"),
    "alpaca": ("### Instruction:\nHi\n\n### Response:\n", "Hello", "Help"),
    "no marker, inside a word": ("What is it?", " Nothing", " Note"),
    "no marker, after a blank": ("The sky is", " blue", " red"),
    "no marker, line break": ("Q: 2+2\nA:\n", "4", "5"),
    "one answer begins the other": ("Say", " it", " it again"),
}


@pytest.mark.parametrize(("prompt", "chosen", "rejected"), RENDERED.values(), ids=RENDERED.keys())
def test_texts(prompt, chosen, rejected):
    assert split_texts(prompt + chosen, prompt + rejected) == (prompt, chosen, rejected)
    assert split_texts(prompt + rejected, prompt + chosen) == (prompt, rejected, chosen)


def test_a_marker_inside_one_answer_is_no_boundary():
    prompt, more = "\n\nHuman: Hi\n\nAssistant:", " Yes?\n\nHuman: Go\n\nAssistant: Gone."
    assert split_texts(prompt + more, prompt + " No.") == (prompt, more, " No.")


def test_identical_texts_leave_an_answer():
    assert split_texts("The sky is blue", "The sky is blue") == ("The sky is", " blue", " blue")


@pytest.mark.parametrize(("chosen", "rejected"), [("abc", "xyz"), ("abc", "abd"), ("a", "a")])
def test_nothing_in_common_is_refused(chosen, rejected):
    with pytest.raises(RowError, match="begin differently"):
        split_texts(chosen, rejected)


def test_messages_end_before_the_answers():
    prompt = [system("s"), user("a"), assistant("b"), user("c")]
    chosen, rejected = [assistant("d")], [assistant("e"), user("f"), assistant("g")]
    assert split_messages(prompt + chosen, prompt + rejected) == (prompt, chosen, rejected)


def test_identical_conversations_leave_an_answer():
    whole = [user("a"), assistant("b")]
    assert split_messages(whole, whole) == ([user("a")], [assistant("b")], [assistant("b")])


def test_conversations_that_part_at_a_question_go_back_to_the_answer_before():
    start = [user("a"), assistant("b")]
    chosen, rejected = [*start, user("c"), assistant("d")], [*start, user("x"), assistant("y")]
    assert split_messages(chosen, rejected) == ([user("a")], chosen[1:], rejected[1:])


@pytest.mark.parametrize("rejected", [[user("x"), assistant("b")], [assistant("b")]])
def test_conversations_without_a_common_question_are_refused(rejected):
    with pytest.raises(RowError, match="begin differently"):
        split_messages([user("a"), assistant("b")], rejected)


WHY = {
    "an unknown role": (
        [user("a"), {"role": "CHATBOT", "content": "b"}],
        [user("a"), {"role": "CHATBOT", "content": "c"}],
        r"chosen has no message from the assistant \(found: user, CHATBOT\).*'CHATBOT': 'ass",
    ),
    "only a question": (
        [user("a"), assistant("b")],
        [user("a")],
        r"rejected has no message from the assistant \(found: user\); end it with one",
    ),
    "one system message": (
        [user("a"), assistant("b")],
        [system("s"), user("a"), assistant("c")],
        "rejected begins with a system message and chosen doesn't",
    ),
    "another field": (
        [{**user("a"), "weight": 0}, assistant("b")],
        [user("a"), assistant("c")],
        "the first messages of chosen and rejected differ in weight",
    ),
    "another order": (
        [user("a"), assistant("b")],
        [dict(reversed(user("a").items())), assistant("c")],
        "the first messages of chosen and rejected differ in order",
    ),
}


@pytest.mark.parametrize(("chosen", "rejected", "text"), WHY.values(), ids=WHY.keys())
def test_the_error_says_why_there_is_no_common_prompt(chosen, rejected, text):
    with pytest.raises(RowError, match=text):
        split_messages(chosen, rejected)


def test_values_that_python_takes_for_equal_are_no_common_prompt():
    def conversation(number, answer):
        call = {"function": {"name": "f", "arguments": {"n": number}}}
        step = {"role": "assistant", "content": "", "tool_calls": [call]}
        return [user("a"), step, assistant(answer)]

    for other in (1.0, True):
        prompt, chosen, rejected = split_messages(conversation(1, "b"), conversation(other, "c"))
        assert prompt == [user("a")]
        assert (len(chosen), len(rejected)) == (2, 2)
