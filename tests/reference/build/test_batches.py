"""Batches keep prompts whole where they can, put the longest first, and fill each call."""

from __future__ import annotations

import functools
from itertools import groupby, pairwise

import pytest
from datasets import Dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpofast.data.packing.collate import Layout
from dpofast.data.packing.packed_row import runs_of_prompts
from dpofast.model.scorer import SequenceScorer
from dpofast.reference.build.answers import read_answers
from dpofast.reference.build.batches import BatchesOfTokens
from tests.reference.stubs import batches_of, pairs
from tests.support import tiny_llama

ids = st.lists(st.integers(3, 4), min_size=1, max_size=6)
some_pairs = st.lists(
    st.tuples(st.sampled_from([[3], [4, 3, 4]]) | ids, ids, ids), min_size=1, max_size=8
)


@functools.cache
def scorer(layout):
    return SequenceScorer(tiny_llama(), None, Layout(layout))


def batches_of_tokens(max_tokens, layout="shared"):
    return BatchesOfTokens(max_tokens, scorer(layout).num_tokens)


def cut(batches, dataset):
    """-> the sequences of each batch, and each batch's own count of tokens."""
    answers = read_answers(dataset)
    made = batches(answers, answers.first)
    return [[answers.ids(each) for each in batch.answers] for batch in made], [
        batch.num_tokens for batch in made
    ]


def positions(sequences, layout="shared"):
    """Count the positions that the model's body really computes in a call."""
    return Layout(layout).collate(sequences, group_sizes=runs_of_prompts(sequences)).num_body_tokens


def shared_prompts(num_prompts, answers_each):
    """Make pairs that share prompts, with those of one prompt far apart in the dataset."""
    rows = pairs(num_prompts * answers_each)
    prompts = [row["prompt_ids"] for row in rows.select(range(num_prompts))]
    return Dataset.from_list(
        [row | {"prompt_ids": prompts[number % num_prompts]} for number, row in enumerate(rows)]
    )


@pytest.mark.parametrize("num_answers", [1, 3, 8, 100])
def test_calls_have_the_given_number_of_answers_and_keep_a_prompts_answers_together(num_answers):
    calls, _ = cut(batches_of(num_answers), shared_prompts(10, 4))
    assert {len(call) for call in calls[:-1]} <= {num_answers}  # only the last may have fewer
    prompts = [tuple(prompt) for call in calls for prompt, _ in call]
    assert len([prompt for prompt, _ in groupby(prompts)]) == len(set(prompts)) == 10


@pytest.mark.parametrize("batches", [batches_of(4), batches_of_tokens(50)], ids=["pairs", "tokens"])
def test_the_longest_come_first(batches):
    calls, _ = cut(batches, shared_prompts(10, 4))
    sequences = [sequence for call in calls for sequence in call]
    assert len(sequences) == 80
    longest = []
    for _, group in groupby(sequences, key=lambda sequence: sequence[0]):
        lengths = [len(prompt) + len(answer) for prompt, answer in group]
        assert lengths == sorted(lengths, reverse=True)
        longest.append(lengths[0])
    assert longest == sorted(longest, reverse=True)


@settings(deadline=None, max_examples=100)
@example([([3], [3] * 3, [3] * 4), ([3], [3] * 5, [3, 3, 3, 4]), ([3], [4], [3])], 12, "shared")
@given(some_pairs, st.sampled_from([1, 9, 20, 60]), st.sampled_from(["shared", "unshared"]))
def test_calls_are_filled_and_counted_in_the_scorers_layout(rows, max_tokens, layout):
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    dataset = Dataset.from_dict({name: [row[i] for row in rows] for i, name in enumerate(names)})
    calls, counted = cut(batches_of_tokens(max_tokens, layout), dataset)
    assert counted == [positions(call, layout) for call in calls]
    answers = read_answers(dataset)
    scored = sorted(sequence for call in calls for sequence in call)
    assert scored == sorted(answers.ids(each) for each in answers.first)  # each answer once
    for call, tokens in zip(calls, counted, strict=True):
        assert tokens <= max_tokens or len(call) == 1
    for call, following in pairwise(calls):
        prompt = following[0][0]
        behind = [sequence for sequence in following if sequence[0] == prompt]
        assert positions([*call, *behind], layout) > max_tokens  # the next prompt had no room


def test_a_prompt_that_fits_is_in_one_call():
    calls, _ = cut(batches_of_tokens(120), shared_prompts(10, 4))
    prompts = [tuple(prompt) for call in calls for prompt in {tuple(p) for p, _ in call}]
    assert len(calls) > 3
    assert len(prompts) == len(set(prompts)) == 10


def test_many_answers_of_one_prompt_are_divided_over_calls_that_all_have_it():
    dataset = shared_prompts(1, 20)
    calls, counted = cut(batches_of_tokens(60), dataset)
    assert len(calls) > 2
    assert all(30 < tokens <= 60 for tokens in counted[:-1])
    assert sum(map(len, calls)) == len(read_answers(dataset).first)


def test_an_answer_longer_than_the_limit_has_a_call_of_its_own():
    calls, _ = cut(batches_of_tokens(1), pairs(3))
    assert [len(call) for call in calls] == [1] * 6


@pytest.mark.parametrize(("layout", "expected"), [("shared", 8), ("unshared", 12), ("padded", 16)])
def test_a_call_costs_the_positions_that_the_body_computes(layout, expected):
    sequences = [([1, 2], [3]), ([1, 2], [3, 4]), ([1, 2], [5]), ([1], [2])]
    assert scorer(layout).num_tokens(sequences) == positions(sequences, layout) == expected


def test_nothing_wanted_makes_no_call():
    answers = read_answers(pairs(3))
    for batches in (batches_of(4), batches_of_tokens(50)):
        assert batches(answers, answers.first[:0]) == []
