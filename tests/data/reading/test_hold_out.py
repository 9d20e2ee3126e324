"""Pairs held out by prompt: no prompt in both parts, and always the same ones."""

from __future__ import annotations

import json
import random
from collections import Counter

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpofast.data import (
    hold_out,
    load_preferences,
    load_unpaired,
    mix_preferences,
    rows_by_source,
)
from dpofast.data.reading.preferences import is_normal_form
from dpofast.errors import ConfigError, DataError
from tests.data.builders import assistant, user

datasets.disable_progress_bars()


def text_rows(prompts):
    return [{"prompt": p, "chosen": f"yes{n}", "rejected": "no"} for n, p in enumerate(prompts)]


def message_rows(prompts):
    return [
        {"prompt": [user(p)], "chosen": [assistant(f"yes{n}")], "rejected": [assistant("no")]}
        for n, p in enumerate(prompts)
    ]


def id_rows(prompts):
    return [
        {"prompt_ids": list(p.encode()), "chosen_ids": [n], "rejected_ids": [n + 1]}
        for n, p in enumerate(prompts)
    ]


KINDS = {"text": text_rows, "messages": message_rows, "ids": id_rows}


def prompts_of(dataset):
    """The prompts of all rows, as text that can be compared."""
    column = "prompt_ids" if "prompt_ids" in dataset.column_names else "prompt"
    return [json.dumps(prompt) for prompt in dataset[column]]


def assert_is_split(whole, parts, fraction=None):
    """Check what every split promises; `fraction` also checks the number of pairs."""
    training, held = parts
    assert is_normal_form(training)
    assert is_normal_form(held)
    assert set(prompts_of(training)).isdisjoint(prompts_of(held))
    assert len(training)
    assert len(held)
    columns = [name for name in ("source", "row") if name in whole.column_names]
    rows = [list(zip(*(part[name] for name in columns), strict=True)) for part in (*parts, whole)]
    assert sorted(rows[0] + rows[1]) == sorted(rows[2])
    order = {row: index for index, row in enumerate(rows[2])}
    for part in rows[:2]:
        assert [order[row] for row in part] == sorted(order[row] for row in part)
    if fraction is not None:
        counts = Counter(prompts_of(training))
        missed = abs(len(held) - fraction * len(whole))
        # The wanted number is rounded, hence the second half. A part never gives its last prompt.
        is_last = len(counts) == 1 or len(set(prompts_of(held))) == 1
        assert missed <= min(counts.values()) / 2 + 0.5 or is_last


few = settings(deadline=None, max_examples=20)
more = settings(deadline=None, max_examples=300)
many = settings(deadline=None, max_examples=1500)
letters = st.lists(st.sampled_from("abcdefghijklmnop"), min_size=2, max_size=60)
numbers = st.integers(2, 60)
fractions = st.floats(0.01, 0.99)


def no_prompt_is_in_both_parts_and_the_size_is_met(prompts, fraction, seed, kind):
    pairs = load_preferences(KINDS[kind](prompts))
    if len(set(prompts)) == 1:
        with pytest.raises(DataError, match="the same prompt"):
            hold_out(pairs, fraction, seed=seed)
        return
    parts = hold_out(pairs, fraction, seed=seed)
    assert_is_split(pairs, parts, fraction)
    again = hold_out(pairs, fraction, seed=seed)
    assert [part["row"] for part in again] == [part["row"] for part in parts]


def the_order_of_the_rows_does_not_matter(prompts, fraction, rng):
    if len(set(prompts)) == 1:
        return
    _, held = hold_out(text_rows(prompts), fraction)
    rng.shuffle(prompts)
    _, shuffled = hold_out(text_rows(prompts), fraction)
    assert set(prompts_of(held)) == set(prompts_of(shuffled))


def no_prompt_of_a_mixture_is_in_both_parts(first, second, fraction, seed):
    """The sets share most prompts."""
    mixture = mix_preferences({"b": text_rows(first), "a": text_rows(second)})
    if len(set(first)) == len(set(second)) == 1:
        return
    parts = hold_out(mixture, fraction, seed=seed)
    assert_is_split(mixture, parts)
    if len(set(first)) > 1:
        _, alone = hold_out(text_rows(first), fraction, seed=seed)
        held = [row for row in parts[1] if row["source"] == "b"]
        assert [row["row"] for row in held] == alone["row"], "the first set is split as if alone"


def shares_hold_for_both_parts(first, second, fraction, weight):
    sets = {
        "a": text_rows(f"a{row // 2}" for row in range(first * 2)),
        "b": text_rows(f"b{row}" for row in range(second)),
    }
    shares = {"a": weight, "b": 1.0}
    parts = hold_out(mix_preferences(sets), fraction, shares=shares)
    assert set(prompts_of(parts[0])).isdisjoint(prompts_of(parts[1]))
    for part in parts:
        for name, count in rows_by_source(part).items():
            expected = shares[name] / sum(shares.values()) * len(part)
            assert abs(count - expected) <= 1 + 1e-9


PROMISES = {
    no_prompt_is_in_both_parts_and_the_size_is_met: (
        *(letters, fractions),
        *(st.integers(-3, 2**70), st.sampled_from(sorted(KINDS))),
    ),
    the_order_of_the_rows_does_not_matter: (letters, fractions, st.randoms()),
    no_prompt_of_a_mixture_is_in_both_parts: (letters, letters, fractions, st.integers(0, 9)),
    shares_hold_for_both_parts: (numbers, numbers, st.floats(0.1, 0.9), st.floats(0.1, 10)),
}


@pytest.mark.parametrize("promise", PROMISES)
@pytest.mark.slow
def test_what_every_split_promises(promise):
    few(given(*PROMISES[promise])(promise))()


@pytest.mark.parametrize(
    "count",
    [
        pytest.param(more, marks=pytest.mark.slow, id="1,200 splits"),
        pytest.param(many, marks=pytest.mark.torture, id="6,000 splits"),
    ],
)
@pytest.mark.parametrize("promise", PROMISES)
def test_what_many_splits_promise(promise, count):
    count(given(*PROMISES[promise])(promise))()


@pytest.mark.slow  # 50,000 pairs
def test_many_pairs_are_split_as_few_are():
    rng = random.Random(1)
    sets = {
        name: text_rows(f"{rng.randrange(size // 2)}" for _ in range(size))
        for name, size in (("a", 40_000), ("b", 8_000), ("c", 2_000))
    }
    mixture = mix_preferences(sets)
    parts = hold_out(mixture, 0.05, seed=5)
    assert_is_split(mixture, parts)
    for name, count in rows_by_source(parts[1]).items():
        # Most prompts of the smaller sets are decided by the larger ones.
        assert 0.02 <= count / len(sets[name]) <= 0.08
    shares = {"a": 0.5, "b": 0.3, "c": 0.2}
    for part in hold_out(mixture, 0.05, seed=5, shares=shares):
        for name, count in rows_by_source(part).items():
            assert abs(count - shares[name] * len(part)) < 1


def test_the_split_of_some_prompts_never_changes():
    """A run that is resumed under a later version must get the same split."""
    _, held = hold_out(text_rows(f"prompt {n}" for n in range(40)), 0.1, seed=42)
    assert held["prompt"] == [f"prompt {n}" for n in (15, 18, 20, 31)]
    _, held = hold_out(message_rows(f"prompt {n}" for n in range(40)), 0.1, seed=42)
    assert held["row"] == [15, 18, 20, 31]
    _, held = hold_out(id_rows(f"prompt {n}" for n in range(40)), 0.1, seed=42)
    assert held["row"] == [10, 20, 33, 39]


def test_a_new_seed_or_a_few_new_prompts_change_what_they_should():
    prompts = [f"prompt {n}" for n in range(1000)]
    _, held = hold_out(text_rows(prompts), 0.1)
    _, other = hold_out(text_rows(prompts), 0.1, seed=7)
    assert len(held) == len(other) == 100
    assert len(set(held["prompt"]) & set(other["prompt"])) < 30
    _, more = hold_out(text_rows([*(f"new {n}" for n in range(20)), *prompts]), 0.1)
    assert len(set(held["prompt"]) - set(more["prompt"])) <= 20


def test_prompts_that_the_template_sees_alike_are_one_prompt():
    """Answers, the order of keys, and columns of other datasets don't make another prompt."""
    tools = [{"name": "f", "description": "d"}], [{"description": "d", "name": "f"}]
    kwargs = {"a": 1, "b": 2}, {"b": 2, "a": 1}
    rows = [
        {**row, "tools": tool, "chat_template_kwargs": options}
        for row in message_rows(["x", "x", "y"])
        for tool, options in zip(tools, kwargs, strict=True)
    ]
    for share in (0.1, 0.5, 0.9):
        assert_is_split(load_preferences(rows), hold_out(rows, share))
    with pytest.raises(DataError, match="the same prompt"):
        hold_out(rows[:4], 0.5)
    mixture = mix_preferences({"a": rows, "b": message_rows(["x", "z"])})
    _, held = hold_out(mixture, 0.4)
    assert held.filter(lambda row: row["source"] == "a")["row"] == hold_out(rows, 0.4)[1]["row"]


@pytest.mark.parametrize(
    "change",
    [
        {"tools": [{"name": "f"}]},
        {"chat_template_kwargs": {"thinking": True}},
        {"prompt": [{**user("x"), "name": "n"}]},
        {"prompt": [{**user("x"), "name": None}]},
        {"prompt": [user([{"type": "text", "text": "x"}])]},
        {"prompt": [user(" x\n")]},
        {"prompt": [{"role": "human", "content": "x"}]},
    ],
)
def test_prompts_that_a_template_may_render_alike_are_one(change):
    row, other = message_rows(["x", "y"])
    rows = [row, {**row, **change}, other]
    for seed in range(4):
        training, held = hold_out(rows, 0.3, seed=seed)
        assert {tuple(training["row"]), tuple(held["row"])} == {(0, 1), (2,)}


def test_another_system_message_makes_another_prompt():
    (row,) = message_rows(["x"])
    other = {**row, "prompt": [{"role": "system", "content": "s"}, user("x")]}
    assert [len(part) for part in hold_out([row, other], 0.5)] == [1, 1]


def test_rows_without_a_pair_stay_with_the_training_pairs():
    rows = text_rows("abcdefgh")
    rows[2]["chosen"], rows[5]["rejected"] = "", None
    pairs = load_preferences(rows, skip_bad_rows=True)
    training, held = hold_out(pairs, 0.5)
    assert (len(training), len(held)) == (5, 3)
    assert {2, 5} < set(training["row"])
    mixture = mix_preferences({"a": pairs, "b": text_rows("xyzw")})
    assert rows_by_source(mixture) == {"a": 6, "b": 4}
    training, held = hold_out(mixture, 0.5, shares={"a": 0.5, "b": 0.5})
    assert rows_by_source(training) == {"a": 3, "b": 2}, "3 is within one row of half of 5"
    assert rows_by_source(held) == {"a": 3, "b": 2}
    assert (len(training), len(held)) == (7, 5)
    taken = mix_preferences({"a": pairs, "b": text_rows("xyzw")}, {"a": 0.5, "b": 0.5})
    assert rows_by_source(taken) == {"a": 5, "b": 4}
    assert [row for row, out in zip(taken["row"], taken["left_out"], strict=True) if out] == [2, 5]


def test_the_shares_are_those_of_the_mixture():
    with pytest.raises(ConfigError, match="shares are given for 'a', but the datasets are 'x'"):
        hold_out(text_rows("ab"), 0.5, shares={"a": 1}, name="x")


def test_a_count_is_a_number_of_pairs():
    rows = text_rows(f"{n}" for n in range(50))
    training, held = hold_out(rows, 7)
    assert (len(training), len(held)) == (43, 7)
    mixture = mix_preferences({"a": rows, "b": text_rows(f"b{n}" for n in range(150))})
    _, held = hold_out(mixture, 40)
    assert rows_by_source(held) == {"a": 10, "b": 30}
    _, held = hold_out(mixture, 40, shares={"a": 0.5, "b": 0.5})
    assert rows_by_source(held) == {"a": 20, "b": 20}


@pytest.mark.parametrize("split", [0, -1, 0.0, 1.0, -0.5, 2.5, True, None, "0.1", float("nan")])
def test_a_split_that_cannot_be_used_is_refused(split):
    with pytest.raises(ConfigError, match=r"as eval_split, expected the part of the pairs"):
        hold_out(text_rows("ab"), split)


def test_messages_about_unpaired_rows_speak_of_rows(caplog):
    rows = load_unpaired([{"prompt": p, "completion": "x", "label": True} for p in "abcd"])
    with caplog.at_level("INFO", logger="dpofast"):
        hold_out(rows, 1, name="x")
    assert "x: 1 of 4 rows held out" in caplog.text
    with pytest.raises(DataError, match="eval_split is 4, but there are only 4 rows"):
        hold_out(rows, 4)
    with pytest.raises(DataError, match="no rows can be held out, because all rows of a"):
        hold_out(rows.select([0]), 0.5)


def test_a_split_that_leaves_nothing_is_refused():
    with pytest.raises(DataError, match="eval_split is 2, but there are only 2 pairs"):
        hold_out(text_rows("ab"), 2, name="x")
    with pytest.raises(DataError, match="x: no pairs can be held out"):
        hold_out(text_rows("aa"), 0.5, name="x")
    one_prompt_each = mix_preferences({"a": text_rows("xx"), "b": text_rows("y")})
    with pytest.raises(DataError, match="no pairs can be held out"):
        hold_out(one_prompt_each, 0.5)
    mixture = mix_preferences({"a": text_rows("abc"), "b": text_rows("x")})
    with pytest.raises(DataError, match=r"held-out pairs: .* nothing of b \(a has 2, b has 0\)"):
        hold_out(mixture, 0.5, shares={"a": 0.5, "b": 0.5})
