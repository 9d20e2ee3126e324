"""The report names what a source has and training doesn't use."""

from __future__ import annotations

import pytest

from dpofast.data import load_preferences, tokenize_preferences
from tests.data.builders import CHAT_TEMPLATE, assistant, byte_bpe, user

WITH_TOOLS = CHAT_TEMPLATE + "{% if tools %}{{ tools | tojson }}{% endif %}"
MESSAGES = {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}
TEXT = {"prompt": "a", "chosen": "b", "rejected": "c"}


def report_of(rows, template=CHAT_TEMPLATE):
    tokenizer = byte_bpe(chat_template=template)
    return tokenize_preferences(load_preferences(rows), tokenizer, max_length=None)[1]


def test_columns_that_no_form_reads_are_named_once_they_hold_something():
    rows = [{**TEXT, "score": None, "note": ""}, {**TEXT, "score": 0.5, "note": "", "weight": 2}]
    report = report_of(rows)
    assert report.unused == ("score", "weight")
    assert "  not used: score, weight" in report.lines()
    assert report.as_dict()["unused"] == ["score", "weight"]


def test_everything_is_used():
    report = report_of([MESSAGES])
    assert report.unused == ()
    assert not any("not used" in line for line in report.lines())


@pytest.mark.parametrize(
    ("row", "template", "unused"),
    [
        ({**MESSAGES, "tools": [{"name": "f"}]}, CHAT_TEMPLATE, ("tools",)),
        ({**MESSAGES, "tools": [{"name": "f"}]}, WITH_TOOLS, ()),
        (
            {**MESSAGES, "tools": [{"name": "f"}]},
            {"default": CHAT_TEMPLATE, "tool_use": WITH_TOOLS},
            (),
        ),
        ({**TEXT, "tools": [{"name": "f"}]}, WITH_TOOLS, ("tools",)),
    ],
)
def test_tools_that_the_template_ignores_are_named(row, template, unused):
    assert report_of([row], template).unused == unused


@pytest.mark.parametrize(
    ("field", "template", "unused"),
    [
        ("name", CHAT_TEMPLATE, ("name in messages",)),
        ("name", CHAT_TEMPLATE + "{{ messages[0].name }}", ()),
        ("name", "{% for m in messages %}{{ m | tojson }}{% endfor %}", ()),
        ("thinking", CHAT_TEMPLATE + "{{ messages[0].reasoning_content }}", ()),
    ],
)
def test_fields_of_messages_that_the_template_ignores_are_named(field, template, unused):
    row = {**MESSAGES, "prompt": [{**user("a"), field: "b"}]}
    assert report_of([row], template).unused == unused


def test_nulls_of_structs_are_one_line():
    import datasets

    rows = [{**MESSAGES, "prompt": [{**user("a"), "name": name}]} for name in ("x", None)]
    lines = report_of(datasets.Dataset.from_list(rows)).lines()
    assert sum("null in Arrow's structs" in line for line in lines) == 1
    assert not any("null in Arrow" in line for line in report_of(rows).lines())
