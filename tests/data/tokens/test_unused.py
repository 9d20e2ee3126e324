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
    rows = [{**TEXT, "score": None, "note": ""}, {**TEXT, "score": 0.5, "note": "", "margin": 2}]
    report = report_of(rows)
    assert report.unused == ("score", "margin")
    assert "  not used: score, margin" in report.lines()
    assert report.as_dict()["unused"] == ["score", "margin"]


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
        # The template reads the name of a function, not that of a message.
        (
            "name",
            CHAT_TEMPLATE + "{% for c in messages[0].calls %}{{ c.function.name }}{% endfor %}",
            ("name in messages",),
        ),
        ("tool_calls", CHAT_TEMPLATE, ("tool_calls in messages",)),
    ],
)
def test_fields_of_messages_that_the_template_ignores_are_named(field, template, unused):
    row = {**MESSAGES, "prompt": [{**user("a"), field: "b"}]}
    assert report_of([row], template).unused == unused


def test_a_field_of_a_late_row_is_found_after_a_selection():
    rows = [{**MESSAGES, "prompt": [user(f"a {i}")]} for i in range(2_500)]
    rows[2_300] = {**MESSAGES, "prompt": [{**user("a"), "name": "b", "weight": 2}]}
    pairs = load_preferences(rows).shuffle(seed=1)
    template = CHAT_TEMPLATE + "{{ messages[0].name }}"
    tokenizer = byte_bpe(chat_template=template)
    report = tokenize_preferences(pairs, tokenizer, max_length=None)[1]
    assert report.unused == ("weight in messages",)


def test_options_of_the_template_that_it_ignores_are_named():
    row = {**MESSAGES, "chat_template_kwargs": {"style": "d", "depth": 2}}
    assert report_of([row], CHAT_TEMPLATE + "{{ depth }}").unused == (
        "style in chat_template_kwargs",
    )


def test_notes_of_concatenated_sets_are_merged():
    import datasets

    sets = [load_preferences([{**TEXT, name: 1}]) for name in ("one", "other")]
    pairs = datasets.concatenate_datasets(sets)
    report = tokenize_preferences(pairs, byte_bpe(), max_length=None)[1]
    assert report.unused == ("one", "other")


def test_nulls_of_structs_are_one_line():
    import datasets

    rows = [{**MESSAGES, "prompt": [{**user("a"), "name": name}]} for name in ("x", None)]
    lines = report_of(datasets.Dataset.from_list(rows)).lines()
    assert sum("null in Arrow's structs" in line for line in lines) == 1
    assert not any("null in Arrow" in line for line in report_of(rows).lines())
