"""Several datasets in one: all rows, or shares of it."""

from __future__ import annotations

import itertools

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpofast.data import load_preferences, mix_preferences, rows_by_source, tokenize_preferences
from dpofast.data.reading.preferences import is_normal_form
from dpofast.data.reading.shares import largest_counts
from dpofast.errors import ConfigError, DataError
from tests.data.builders import CHAT_TEMPLATE, assistant, byte_bpe, user

datasets.disable_progress_bars()


def texts(count, word):
    rows = [
        {"prompt": f"{word}{row}", "chosen": f"yes{row}", "rejected": "no"} for row in range(count)
    ]
    return load_preferences(rows, name=word)


def taken(mixture):
    """(source, row) of all rows."""
    return list(zip(mixture["source"], mixture["row"], strict=True))


def test_without_shares_all_rows_are_there_in_order():
    mixture = mix_preferences({"b": texts(3, "b"), "a": texts(2, "a")})
    assert taken(mixture) == [("b", 0), ("b", 1), ("b", 2), ("a", 0), ("a", 1)]
    assert mixture["prompt"] == ["b0", "b1", "b2", "a0", "a1"]
    assert rows_by_source(mixture) == {"b": 3, "a": 2}
    assert is_normal_form(mixture)
    assert is_normal_form(mixture.select([4, 0]))
    assert load_preferences(mixture) is mixture
    assert taken(load_preferences(mixture, strict=True)) == taken(mixture)
    tokens, report = tokenize_preferences(mixture, byte_bpe(), max_length=None)
    assert (len(tokens), report.pairs_read) == (5, 5)


mixtures = settings(deadline=None, max_examples=25)
sizes = st.lists(st.integers(1, 30), min_size=2, max_size=3)
numbers = st.lists(st.floats(0.05, 20), min_size=3, max_size=3)


@mixtures
@given(sizes, numbers, st.integers(-5, 2**40))
def test_shares_are_met_within_one_row_and_no_row_is_repeated(counts, weights, seed):
    sets = {f"set{n}": texts(count, f"set{n}-") for n, count in enumerate(counts)}
    shares = dict(zip(sets, weights, strict=False))
    if largest_counts(counts, weights[: len(counts)]) is None:
        with pytest.raises(DataError, match="the shares leave nothing of"):
            mix_preferences(sets, shares, seed=seed)
        return
    mixture = mix_preferences(sets, shares, seed=seed)
    whole = sum(shares.values())
    for name, count in rows_by_source(mixture).items():
        assert abs(count - shares[name] / whole * len(mixture)) <= 1 + 1e-9
    rows = taken(mixture)
    assert len(set(rows)) == len(rows)
    assert rows == sorted(rows), "sets and rows keep their order"
    assert taken(mix_preferences(sets, shares, seed=seed)) == rows


def test_the_rows_taken_depend_on_the_seed_but_not_on_the_other_sets():
    def rows_of_a(other, share, seed):
        sets = {"a": texts(400, "a"), "b": texts(other, "b")}
        mixture = mix_preferences(sets, {"a": 1 - share, "b": share}, seed=seed)
        return {row for source, row in taken(mixture) if source == "a"}

    few, many = rows_of_a(50, 0.5, 1), rows_of_a(300, 0.5, 1)
    assert (len(few), len(many)) == (51, 301)
    assert few < many
    assert rows_of_a(50, 0.5, 2) != few
    assert max(few) > 200, "not the first rows"
    assert 10 < len(few & rows_of_a(300, 0.5, 2)) < 51


@pytest.mark.slow
def test_optional_columns_and_fields_are_filled_with_nulls():
    with_tools = [
        {
            "messages": [user("call it"), {**assistant("done"), "name": "x"}, user("again")],
            "chosen": assistant("yes"),
            "rejected": assistant("no"),
            "tools": [{"name": "f"}],
            "chat_template_kwargs": {"thinking": True},
        }
    ]
    instruction = [{"instruction": "Say yes.", "chosen": "yes", "rejected": "no"}]
    sets = {"a": with_tools, "b": instruction, "c": with_tools}
    parts = {name: load_preferences(rows) for name, rows in sets.items()}
    tokenizer = byte_bpe(chat_template=CHAT_TEMPLATE + "{{ tools }}{{ thinking }}")
    for order in itertools.permutations("abc"):
        mixture = mix_preferences({name: parts[name] for name in order})
        row = mixture[order.index("b")]
        assert row["tools"] is None
        assert row["chat_template_kwargs"] is None
        assert row["plain_prompt"] is not None
        mixed, _ = tokenize_preferences(mixture, tokenizer, max_length=None)
        for name, pair in zip(order, mixed, strict=True):
            (alone,), _ = tokenize_preferences(parts[name], tokenizer, max_length=None)
            for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
                assert pair[column] == alone[column]


MESSAGES = [{"prompt": [user("a")], "chosen": "b", "rejected": "c"}]
IDS = [{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}]
TEXT = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
SCORED = [{**TEXT[0], "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}]


@pytest.mark.parametrize(
    ("sets", "sentence"),
    [
        ({"x": TEXT, "y": MESSAGES}, "x has text, but y has messages.*both as messages, or both"),
        ({"x": TEXT, "y": TEXT, "z": IDS}, "x has text, but z has token ids.*texts of both"),
        ({"x": TEXT, "y": SCORED}, "y has ref_chosen_logps and ref_rejected_logps, but x has not"),
        ({"x": mix_preferences({"a": TEXT, "b": TEXT}), "y": TEXT}, "x is a mixture already"),
        ({"x": TEXT, "y": [{"prompt": "a", "chosen": "b"}]}, "y, row 0.*'rejected'"),
    ],
)
def test_sets_that_do_not_go_together_are_refused_by_name(sets, sentence):
    with pytest.raises(DataError, match=sentence):
        mix_preferences(sets)


def test_log_probs_of_all_sets_are_kept():
    mixture = mix_preferences({"x": SCORED, "y": SCORED})
    assert mixture["ref_rejected_logps"] == [-2.0, -2.0]


def test_the_report_names_what_is_unused_in_any_of_the_sets():
    sets = {"x": [{**TEXT[0], "score": 1}], "y": [{**TEXT[0], "id": 5, "chosen": "c"}]}
    pairs, report = tokenize_preferences(mix_preferences(sets), byte_bpe(), max_length=None)
    assert report.unused == ("score", "id")
    assert report.left_out == {"identical answers": ("y row 0",)}
    assert pairs["source"] == ["x"]


@pytest.mark.parametrize(
    ("shares", "sentence"),
    [
        ({"x": 0.5}, "shares are given for 'x', but the datasets are 'x', 'y'"),
        ({"x": 0.5, "z": 0.5}, "shares are given for 'x', 'z'"),
        ({}, "shares are given for nothing"),
        ({"x": 1, "y": 0}, "got 0 as the share of 'y', expected a number above 0"),
        ({"x": 1, "y": -0.1}, "got -0.1 as the share of 'y'"),
        ({"x": 1, "y": float("nan")}, "got nan as the share of 'y'"),
        ({"x": 1, "y": float("inf")}, "got inf as the share of 'y'"),
        ({"x": 1, "y": True}, "got True as the share of 'y'"),
        ({"x": 1, "y": "0.1"}, "got '0.1' as the share of 'y'"),
    ],
)
def test_shares_that_cannot_be_used_are_refused(shares, sentence):
    with pytest.raises(ConfigError, match=sentence):
        mix_preferences({"x": TEXT, "y": TEXT}, shares)


def test_no_sets_are_refused():
    with pytest.raises(ConfigError, match="name at least one dataset"):
        mix_preferences({})


def test_a_set_that_would_give_nothing_is_named():
    sets = {"x": texts(3, "x"), "y": texts(3, "y"), "z": texts(3, "z")}
    with pytest.raises(DataError, match=r"nothing of z \(x has 3, y has 3, z has 3\); raise"):
        mix_preferences(sets, {"x": 0.98, "y": 0.011, "z": 0.009})
