"""Which answers of a prompt are compared, beside a plain reference."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from dpofast.data.reading.answer_pairs import answer_pairs_of, check_answer_pairs
from dpofast.data.reading.row_error import RowError
from dpofast.errors import ConfigError


def naive_pairs(scores, how):
    """All ordered pairs of places, checked one by one."""
    pairs = []
    for chosen, rejected in itertools.permutations(range(len(scores)), 2):
        better, worse = scores[chosen], scores[rejected]
        between = any(worse < score < better for score in scores)
        if better > worse and not (how == "adjacent" and between):
            pairs.append((chosen, rejected))
    if how == "best_worst":
        ends = [p for p in pairs if (scores[p[0]], scores[p[1]]) == (max(scores), min(scores))]
        return ends[:1]  # permutations come in order, so the first of each
    return sorted(pairs, key=lambda pair: (min(pair), max(pair)))


@pytest.mark.parametrize("how", ["all", "best_worst", "adjacent"])
@pytest.mark.parametrize("column", ["scores", "ranks"])
def test_pairs_are_those_of_a_plain_reference(how, column):
    draw = random.Random(0)
    for size in (2, 3, 4, 7) * 10:
        numbers = [draw.choice([0, 1, 2.5, 3]) for _ in range(size)]
        if len(set(numbers)) == 1:
            continue
        made = answer_pairs_of({column: numbers}, size, how)
        scores = numbers if column == "scores" else [-rank for rank in numbers]
        assert made.pairs == naive_pairs(scores, how)
        equal = sum(a == b for a, b in itertools.combinations(numbers, 2))
        assert made.ties == (0 if how == "best_worst" else equal)
        assert (made.how, made.column) == (how, column)


def test_all_pairs_and_given_ones_are_the_defaults():
    assert answer_pairs_of({"scores": [1, 2, 3]}, 3, None).pairs == [(1, 0), (2, 0), (2, 1)]
    given = {"scores": None, "ranks": "", "preferences": [[2, 0], [0, 2], [2, 0]]}
    assert answer_pairs_of(given, 3, None).pairs == [(2, 0), (0, 2), (2, 0)]
    assert answer_pairs_of(given, 3, "given").how == "given"


def test_arrays_and_numbers_as_text_are_read():
    assert answer_pairs_of({"scores": np.array([0.5, 2])}, 2, None).pairs == [(1, 0)]
    assert answer_pairs_of({"scores": ["0.5", " 2"]}, 2, None).pairs == [(1, 0)]
    assert answer_pairs_of({"preferences": np.array([[1, 0]])}, 2, None).pairs == [(1, 0)]
    for pair in (np.array([1, 0]), [np.int64(1), np.int64(0)]):
        assert answer_pairs_of({"preferences": [pair]}, 2, None).pairs == [(1, 0)]


BAD = {
    "no column": ({}, "the row has completions, and nothing says .* columns={'scores': "),
    "nulls": ({"scores": None, "ranks": None}, "scores and ranks are null, and nothing says"),
    "two columns": ({"scores": [1, 2, 3], "preferences": [[0, 1]]}, "has scores and preferences"),
    "equal": ({"scores": [2, 2, 2]}, "all scores are 2, so no answer .*; remove the row"),
    "equal ranks": ({"ranks": [1, 1, 1]}, "all ranks are 1"),
    "no list": ({"scores": 3}, "scores is not a list of numbers but 3"),
    "too few": ({"scores": [1, 2]}, "scores has 2 numbers, but completions has 3 answers"),
    "null": ({"scores": [1, None, 2]}, r"scores\[1\] is null, expected a finite number"),
    "nan": ({"scores": [1, 2, float("nan")]}, r"scores\[2\] is nan"),
    "infinite": ({"ranks": [float("inf"), 2, 1]}, r"ranks\[0\] is inf"),
    "bool": ({"scores": [True, 2, 1]}, r"scores\[0\] is True"),
    "word": ({"scores": ["good", 2, 1]}, r"scores\[0\] is 'good'"),
    "negative rank": ({"ranks": [-1, 1, 2]}, r"ranks\[0\] is -1, but a rank is never below 0"),
    "empty": ({"preferences": []}, "preferences is empty"),
    "text": ({"preferences": "0>1"}, r"preferences is not a list of \[chosen, rejected\]"),
    "one place": ({"preferences": [[0, 1], [2]]}, r"preferences\[1\] is not \[chosen, rejected\]"),
    "out of range": ({"preferences": [[0, 3]]}, r"3 names no answer: .* 0 to 2"),
    "negative": ({"preferences": [[0, -1]]}, "-1 names no answer"),
    "float": ({"preferences": [[0, 1.0]]}, "1.0 names no answer"),
    "bool place": ({"preferences": [[True, 0]]}, "True names no answer"),
    "itself": ({"preferences": [[1, 1]]}, "compares an answer with itself"),
}


@pytest.mark.parametrize(("row", "message"), BAD.values(), ids=BAD.keys())
def test_rows_without_usable_pairs_are_refused(row, message):
    with pytest.raises(RowError, match=message):
        answer_pairs_of(row, 3, None)


@pytest.mark.parametrize(("count", "word"), [(0, "no answers"), (1, "1 answer,")])
def test_one_answer_is_no_pair(count, word):
    with pytest.raises(RowError, match=f"completions has {word}.* needs two"):
        answer_pairs_of({"scores": [1] * count}, count, None)


def test_an_option_that_contradicts_the_column_is_refused():
    with pytest.raises(RowError, match=r"answer_pairs is given, .* has scores .* all, best_worst"):
        answer_pairs_of({"scores": [1, 2]}, 2, "given")
    with pytest.raises(RowError, match=r"the row has preferences, .* answer_pairs is all; leave"):
        answer_pairs_of({"preferences": [[0, 1]]}, 2, "all")


def test_unknown_values_of_the_option_are_refused():
    check_answer_pairs(None)
    check_answer_pairs("adjacent")
    with pytest.raises(ConfigError, match="answer_pairs: got 'best', expected one of all, best_"):
        check_answer_pairs("best")
