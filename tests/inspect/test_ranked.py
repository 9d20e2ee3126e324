"""What `dpofast inspect` prints of a row with many answers."""

from __future__ import annotations

import pytest

from dpofast.data import load_preferences
from dpofast.data.tokens.truncate import LengthLimits
from dpofast.errors import DataError
from dpofast.inspect.pair import render_untokenised_pair
from tests.data.builders import byte_bpe
from tests.inspect.test_pair import printed

ROW = {"prompt": "ab", "completions": [" xy", " xz", " x", " xz"], "scores": [2, 3, 0, 2]}


def test_each_answer_is_shown_once_with_the_pairs():
    text = printed(render_untokenised_pair(load_preferences([ROW])[0], byte_bpe()))
    assert [line.rstrip() for line in text.splitlines()] == [
        "row 0 (counted from 0): prompt 2 tokens, answers 4, 4, 3, 4; the answers share their "
        "first 2 tokens",
        "pairs, chosen > rejected (5): 1 > 0, 0 > 2, 1 > 2, 1 > 3, 3 > 2",
        "pairs that equal scores leave unmade: 1",
        "left out of training, 1 > 3: identical answers",
        "prompt, masked (2)    a|b",
        "all answers begin (2)  |x",
        "answer 0, scored (2)  y|</s>",
        "answer 1, scored (2)  z|</s>",
        "answer 2, scored (1)  </s>",
        "answer 3, scored (2)  z|</s>",
    ]


def test_what_is_cut_is_shown():
    limits = LengthLimits(5)
    text = printed(render_untokenised_pair(load_preferences([ROW])[0], byte_bpe(), limits=limits))
    assert (
        "max_length 5 (keep_start): cut 0 tokens of the prompt on its left, 1 of answer 0, " in text
    )
    assert "answer 1, cut (1)     </s>" in text
    limits = LengthLimits(6)
    text = printed(render_untokenised_pair(load_preferences([ROW])[0], byte_bpe(), limits=limits))
    assert "max_length 6 (keep_start): nothing is cut" in text


def test_a_pair_that_was_left_out_says_why():
    rows = load_preferences([{**ROW, "completions": [" xy", "", " x", " xz"]}])
    with pytest.raises(DataError, match=r"row 0 .*: left out of training: empty answer"):
        render_untokenised_pair(rows[1], byte_bpe())


def test_answers_have_their_numbers_in_the_source():
    row = load_preferences([ROW], answer_pairs="best_worst")[0]
    text = printed(render_untokenised_pair(row, byte_bpe(), limits=LengthLimits(5)))
    assert "pairs, chosen > rejected (1): 1 > 2" in text
    assert "on its left, 1 of answer 1 on its right" in text
    assert [f"answer {place}, scored" in text for place in range(4)] == [False, True, True, False]
