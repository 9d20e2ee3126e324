"""Prompts with several answers have exactly the pairs that are described."""

from __future__ import annotations

import pytest
from datasets import Dataset, Features, List, Value

from benchmarks.answer_pairs import answer_pairs, num_pairs, rows_needed

SIDES = ("prompt_ids", "chosen_ids", "rejected_ids")
INTEGERS = List(Value("int32"))


def rows(count):
    """Row i has the prompt [i], the chosen answer [10 i + 1] and the rejected one [10 i + 2]."""
    ids = [([row], [10 * row + 1], [10 * row + 2]) for row in range(count)]
    columns = dict(zip(SIDES, map(list, zip(*ids, strict=True)), strict=True))
    return Dataset.from_dict(columns, features=Features(dict.fromkeys(SIDES, INTEGERS)))


def made(count, prompts, answers):
    pairs = answer_pairs(rows(count), prompts, answers, max_length=2)
    return [tuple(pair[side][0] for side in SIDES) for pair in pairs]


def test_two_answers_are_the_rows_themselves():
    given = rows(3)
    pairs = answer_pairs(given, 3, 2, max_length=2)
    assert pairs.to_list() == given.to_list()
    assert pairs.features == given.features


def test_four_answers_are_those_of_two_rows():
    assert rows_needed(2, 4) == 4
    assert made(4, prompts=2, answers=4) == [
        (0, 1, 2),
        (0, 1, 21),
        (0, 1, 22),
        (0, 2, 21),
        (0, 2, 22),
        (0, 21, 22),
        (1, 11, 12),
        (1, 11, 31),
        (1, 11, 32),
        (1, 12, 31),
        (1, 12, 32),
        (1, 31, 32),
    ]


def test_three_answers_leave_out_a_rejected_one():
    assert rows_needed(1, 3) == 2
    assert made(2, prompts=1, answers=3) == [(0, 1, 2), (0, 1, 11), (0, 2, 11)]


@pytest.mark.parametrize("answers", [2, 3, 4, 7])
def test_every_prompt_has_all_pairs_of_its_own_answers(answers):
    found = made(rows_needed(3, answers), 3, answers)
    assert len(set(found)) == len(found) == 3 * num_pairs(answers)
    taken = [
        {answer for pair in found if pair[0] == prompt for answer in pair[1:]}
        for prompt in range(3)
    ]
    assert [len(each) for each in taken] == [answers] * 3
    assert len(set().union(*taken)) == 3 * answers


def test_an_answer_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"Prompt 0 has 2 tokens .* more than the race's 1"):
        answer_pairs(rows(2), 1, 4, max_length=1)
