"""The columns weight and label_confidence are read from every form, or refused with their row."""

from __future__ import annotations

import csv
import json

import datasets
import pytest

from dpofast.columns import WEIGHT_COLUMNS
from dpofast.data import (
    PairStream,
    TokenStream,
    hold_out,
    load_preferences,
    mix_preferences,
    tokenize_preferences,
)
from dpofast.data.tokens.truncate import LengthLimits
from dpofast.errors import ConfigError, DataError
from tests.data.builders import assistant, byte_bpe, user

datasets.disable_progress_bars()

TEXT = {"prompt": "2+2=", "chosen": "4", "rejected": "5"}
GIVEN = {"weight": 2, "label_confidence": 0.75}
FORMS = {
    "text": TEXT,
    "messages": {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
    "implicit": {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
    "answer objects": {
        "messages": [user("a")],
        "chosen": assistant("b"),
        "rejected": assistant("c"),
    },
    "instruction": {"instruction": "2+2?", "chosen": "4", "rejected": "5"},
    "openai": {
        "input": {"messages": [user("a")]},
        "preferred_output": [assistant("b")],
        "non_preferred_output": [assistant("c")],
    },
    "swift": {"messages": [user("a"), assistant("b")], "rejected_response": "c"},
    "ids": {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]},
    "old ids": {"prompt_input_ids": [1], "chosen_input_ids": [2], "rejected_input_ids": [3]},
}


def columns_of(dataset):
    return {name: dataset[name] for name in WEIGHT_COLUMNS if name in dataset.column_names}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_can_have_them(form):
    pairs = load_preferences([FORMS[form] | GIVEN, FORMS[form] | GIVEN | {"weight": "0"}])
    expected = {"weight": [2.0, 0.0], "label_confidence": [0.75, 0.75]}
    assert columns_of(pairs) == expected
    assert columns_of(load_preferences(pairs, strict=True)) == expected
    assert columns_of(load_preferences([FORMS[form]])) == {}


def test_each_of_several_rejected_answers_has_those_of_its_row():
    pairs = load_preferences([{**TEXT, **GIVEN, "rejected": ["5", "6"]}])
    assert columns_of(pairs) == {"weight": [2.0, 2.0], "label_confidence": [0.75, 0.75]}


def test_they_can_have_other_names_and_are_no_unused_columns(tmp_path):
    rows = [{**TEXT, "heft": 0.5, "weight": "heavy", "agreement": 0.9}]
    names = {"weight": "heft", "label_confidence": "agreement"}
    pairs = load_preferences(rows, columns=names)
    assert columns_of(pairs) == {"weight": [0.5], "label_confidence": [0.9]}
    tokens, report = tokenize_preferences(pairs, byte_bpe(), max_length=None)
    assert columns_of(tokens) == {"weight": [0.5], "label_confidence": [0.9]}
    assert report.unused == ()


def test_cells_of_a_csv_file_are_numbers(tmp_path):
    path = tmp_path / "pairs.csv"
    with path.open("w") as file:
        writer = csv.DictWriter(file, [*TEXT, "weight"])
        writer.writeheader()
        writer.writerows([TEXT | {"weight": "1e-1"}, TEXT | {"weight": "3"}])
    assert load_preferences(path)["weight"] == [0.1, 3.0]


@pytest.mark.parametrize(
    ("column", "value", "shown"),
    [
        ("weight", -0.5, "-0.5"),
        ("weight", float("nan"), "nan"),
        ("weight", float("inf"), "inf"),
        ("weight", 10**400, "1000"),
        ("weight", "heavy", "'heavy'"),
        ("weight", True, "True"),
        ("weight", [1.0], r"\[1.0\]"),
        ("label_confidence", 1.5, "1.5"),
        ("label_confidence", -0.1, "-0.1"),
        ("label_confidence", float("nan"), "nan"),
        ("label_confidence", "sure", "'sure'"),
    ],
)
def test_a_bad_value_is_named_with_its_file_and_row(tmp_path, column, value, shown):
    path = tmp_path / "pairs.jsonl"
    rows = [TEXT | GIVEN, TEXT | GIVEN | {column: value}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=rf"pairs.jsonl, line 2: {column} is {shown}") as caught:
        load_preferences(path)
    assert f"columns={{'{column}': 'your_column'}}" in str(caught.value)
    assert len(load_preferences(path, skip_bad_rows=True).filter(lambda row: row["prompt"])) == 1


@pytest.mark.parametrize("column", WEIGHT_COLUMNS)
@pytest.mark.parametrize(
    "empty", [{}, *({"weight": each, "label_confidence": each} for each in (None, "", " "))]
)
def test_all_rows_have_them_or_none(column, empty):
    given = {column: 0.75}
    with pytest.raises(DataError, match=rf"row 1 .* {column} is missing, but other rows have it"):
        load_preferences([TEXT | given, TEXT | empty, TEXT | given])
    rows = [TEXT] * 1000 + [TEXT | given]
    with pytest.raises(DataError, match=rf"row 1000 .* has {column}, but the first rows have none"):
        load_preferences(rows)


def test_an_answer_that_is_left_out_needs_none():
    rows = [TEXT | GIVEN, TEXT | {"chosen": ""}, TEXT | GIVEN]
    tokens, report = tokenize_preferences(load_preferences(rows), byte_bpe(), max_length=None)
    assert tokens["weight"] == [2.0, 2.0]
    assert report.left_out == {"empty answer": (1,)}


def test_held_out_pairs_keep_theirs():
    rows = [TEXT | {"prompt": f"{n}?", "weight": n} for n in range(20)]
    training, held_out = hold_out(rows, 0.25)
    for part in (training, held_out):
        assert part["weight"] == [float(prompt[:-1]) for prompt in part["prompt"]]
    assert len(held_out) == 5


def test_a_stream_reads_them_as_a_dataset_does():
    rows = [TEXT | {"prompt": f"{n}?", "weight": n / 4, "label_confidence": 0.5} for n in range(9)]
    rows[4]["chosen"] = rows[4]["rejected"]
    stream = datasets.IterableDataset.from_generator(lambda: iter(rows))
    tokens = TokenStream(PairStream(stream), byte_bpe(), limits=LengthLimits())
    parts = [tokens.read(5).pairs, tokens.read(5).pairs]
    found = datasets.concatenate_datasets(parts)
    whole, _ = tokenize_preferences(load_preferences(rows), byte_bpe(), max_length=None)
    assert columns_of(found) == columns_of(whole)
    assert len(found["weight"]) == 8


def test_weights_of_datasets_multiply_those_of_their_rows():
    sets = {"a": [TEXT | {"weight": 3}, TEXT | {"weight": 0.5}], "b": [TEXT]}
    assert mix_preferences(sets)["weight"] == [3.0, 0.5, None]
    mixture = mix_preferences(sets, weights={"b": 0.25, "a": 2})
    assert mixture["weight"] == [6.0, 1.0, 0.25]
    assert mixture["source"] == ["a", "a", "b"]
    again = load_preferences(mixture, strict=True)
    assert again["weight"] == mixture["weight"]
    shared = mix_preferences(sets, {"a": 1, "b": 1}, weights={"a": 1, "b": 0.5})
    assert shared["weight"][-1] == 0.5


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ({"a": 1}, "weights are given for 'a', but the datasets are 'a', 'b'; give each of them"),
        ({"a": 1, "b": -1}, "got -1 as the weight of 'b', expected a number of at least 0"),
        ({"a": 1, "b": float("nan")}, "got nan as the weight of 'b'"),
        ({"a": True, "b": 1}, "got True as the weight of 'a'"),
        ({"a": 0, "b": 0.0}, "all weights are 0, so nothing would be trained"),
    ],
)
def test_refuses_weights_of_datasets_that_cannot_be_used(weights, sentence):
    with pytest.raises(ConfigError, match=sentence):
        mix_preferences({"a": [TEXT], "b": [TEXT]}, weights=weights)
