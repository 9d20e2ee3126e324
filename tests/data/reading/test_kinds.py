"""Whether a source holds pairs or unpaired rows, and what is said if it's the wrong one."""

from __future__ import annotations

import datasets
import pytest

from dpofast.data import data_kind, load_preferences, load_unpaired
from dpofast.errors import DataError
from tests.data.builders import assistant, user, write_rows

PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
UNPAIRED = {"prompt": "a", "completion": "b", "label": True}
UNPAIRED_ROWS = {
    "trl": (UNPAIRED, "'label'"),
    "messages": ({"messages": [user("a"), assistant("b")], "label": False}, "'label'"),
    "sharegpt": ({"conversations": [{"from": "human", "value": "a"}], "kto_tag": 1}, "'kto_tag'"),
    "alpaca": ({"instruction": "a", "output": "b", "kto_tag": True}, "'kto_tag'"),
    "ids": ({"prompt_ids": [1], "completion_ids": [2], "label": True}, "'label'"),
}
PAIRED_ROWS = {
    "pair": PAIR,
    "pair with a label": {**PAIR, "label": 1},
    "empty answers": {"prompt": "a", "chosen": None, "rejected": None, "label": 1},
    "swift": {"messages": [user("a"), assistant("b")], "rejected_response": "c", "label": True},
    "ids": {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]},
    "unused completions": {**PAIR, "completions": ["b", "c"], "scores": [1, 0]},
    "no answers beside completions": {"chosen": None, "rejected": None, "completions": ["b", "c"]},
    "nothing tells": {"text": "a"},
}


@pytest.mark.parametrize(("row", "label"), UNPAIRED_ROWS.values(), ids=UNPAIRED_ROWS.keys())
def test_unpaired_rows_are_known_and_refused_in_one_sentence(row, label):
    assert data_kind([row]) == "unpaired"
    with pytest.raises(DataError) as caught:
        load_preferences([row] * 30, name="rows")
    message = str(caught.value)
    assert message.startswith(f"rows holds unpaired rows, each with one answer and {label} (KTO)")
    assert "train on unpaired rows with loss_type kto (KTOTrainer in Python)" in message
    assert "\n" not in message


@pytest.mark.parametrize("row", PAIRED_ROWS.values(), ids=PAIRED_ROWS.keys())
def test_pairs_are_known(row):
    assert data_kind([row]) == "paired"


def test_pairs_are_refused_in_one_sentence_where_unpaired_rows_are_wanted(tmp_path):
    path = write_rows(tmp_path / "pairs.jsonl", [PAIR] * 30)
    with pytest.raises(DataError) as caught:
        load_unpaired(path)
    assert str(caught.value) == (
        f"{path} holds pairs, and unpaired rows are wanted, each with one answer and a label "
        "(KTO); split_pairs of dpofast.data splits each pair into two rows"
    )


def test_a_row_of_the_other_kind_is_named():
    with pytest.raises(DataError, match=r"row 1 .*the row is unpaired, with one .*loss_type kto"):
        load_preferences([PAIR, UNPAIRED], name="rows")
    with pytest.raises(DataError, match=r"rows, row 1 .*the row is a pair, .*split_pairs"):
        load_unpaired([UNPAIRED, PAIR], name="rows")


def test_nulls_of_other_rows_say_nothing():
    rows = datasets.Dataset.from_list([{**UNPAIRED, "chosen": None, "rejected": None}])
    assert data_kind(rows) == "unpaired"
    assert len(load_unpaired(rows)) == 1


def test_columns_are_mapped_first():
    row = {"q": "a", "a": "b", "good": True}
    columns = {"prompt": "q", "completion": "a", "label": "good"}
    assert data_kind([row]) == "paired"
    assert data_kind([row], columns=columns) == "unpaired"
    with pytest.raises(DataError, match="unpaired rows"):
        load_preferences([row], columns=columns)


def test_a_json_file_can_be_one_unpaired_row(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", '
        '"content": "b"}], "label": true}'
    )
    assert load_unpaired(path)["label"][:] == [True]
