"""What a row says besides its prompt and answers is used, refused or known to be unused."""

from __future__ import annotations

import json

import pytest

from dpofast.data.reading.formats import read_pairs
from dpofast.data.reading.options import MEDIA_COLUMNS
from dpofast.data.reading.row_error import RowError
from tests.data.builders import assistant, user

ROW = {"prompt": [user("2+2?")], "chosen": [assistant("4")], "rejected": [assistant("5")]}
TEXT = {"prompt": "2+2=", "chosen": "4", "rejected": "5"}
TOOLS = [{"type": "function", "function": {"name": "add", "arguments": {"b": 1, "a": None}}}]


def read(row):
    (pair,) = read_pairs(row, list(row), {})
    return pair


def test_tools_and_options_keep_the_order_of_the_file():
    options = {"thinking": False, "effort": "low"}
    pair = read({**ROW, "tools": TOOLS, "chat_template_kwargs": options})
    assert pair.values["tools"] == json.dumps(TOOLS)
    assert pair.values["chat_template_kwargs"] == json.dumps(options)
    assert pair.used >= {"tools", "chat_template_kwargs"}


@pytest.mark.parametrize("write", [json.dumps, lambda tools: [json.dumps(t) for t in tools]])
def test_tools_as_json_text(write):
    assert read({**ROW, "tools": write(TOOLS)}) == read({**ROW, "tools": TOOLS})


@pytest.mark.parametrize("empty", [None, "", " ", "null", "{}", {}])
@pytest.mark.parametrize("column", ["tools", "chat_template_kwargs"])
def test_empty_options_are_none(column, empty):
    assert read({**ROW, column: empty}).values == ROW


@pytest.mark.parametrize("empty", ["[]", []])
def test_an_empty_list_of_tools_reaches_the_template(empty):
    assert read({**ROW, "tools": empty}).values == {**ROW, "tools": "[]"}
    assert read({**ROW, "chat_template_kwargs": empty}).values == ROW


@pytest.mark.parametrize("names", [["add", "1"], ["1", "2"]])
def test_tools_that_are_only_names_stay_names(names):
    assert json.loads(read({**ROW, "tools": names}).values["tools"]) == names


def test_options_of_a_chat_template_are_unused_beside_text():
    for row in (TEXT, {"chosen": "a b", "rejected": "a c"}):
        pair = read({**row, "tools": TOOLS, "chat_template_kwargs": {"thinking": False}})
        assert not {"tools", "chat_template_kwargs"} & (pair.used | set(pair.values))


@pytest.mark.parametrize("column", MEDIA_COLUMNS)
@pytest.mark.parametrize("row", [ROW, TEXT])
def test_images_and_sound_are_refused(row, column):
    for empty in (None, [], "", [None], {"bytes": None, "path": None}):
        read({**row, column: empty})
    for value in ("cat.png", ["cat.png"], {"bytes": b"x", "path": None}, [object()], 0.5):
        with pytest.raises(RowError, match=rf"{column} holds .* remove the column"):
            read({**row, column: value})


@pytest.mark.parametrize(
    "column", ["output", "label", "score", "score_chosen", "chosen_rating", "margin", "note"]
)
def test_other_columns_are_unused(column):
    for row in (
        ROW,
        TEXT,
        {"messages": ROW["prompt"], "chosen": "4", "rejected": "5"},
        {"instruction": "2+2?", "chosen": "4", "rejected": "5"},
    ):
        pair = read({**row, column: 0.5})
        assert pair.used & {*row, column} == set(row)
        assert pair.values == read(row).values
