"""Cuts in cases checked by hand, and the rules that every cut keeps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpofast.data.tokens.truncate import Cut, LengthLimits
from dpofast.errors import ConfigError

CASES = {
    "no limit": ((900, 50, 60, None, "keep_start"), Cut.nothing(2)),
    "long prompts are cut": ((9, 5, 3, None, "keep_start", 4), Cut(5, (0, 0))),
    "a short prompt is whole": ((4, 5, 3, None, "keep_start", 4), Cut.nothing(2)),
    "long answers are cut": ((9, 5, 3, None, "keep_start", None, 3), Cut(0, (2, 0))),
    "both": ((9, 5, 3, None, "keep_start", 4, 2), Cut(5, (3, 1))),
    "max_length comes last": ((9, 9, 3, 10, "keep_start", 4, 8), Cut(5, (3, 0))),
    "the prompt fits once it is cut": ((30, 5, 3, 10, "keep_start", 6), Cut(24, (1, 0))),
    "it still fills max_length": ((30, 5, 3, 10, "keep_start", 12), Cut.nothing(2, fits=False)),
    "keep_end, once more": ((30, 9, 3, 10, "keep_end", 4, 8), Cut(28, (1, 0))),
    "keep_end, a cut answer needs less": ((30, 90, 3, 10, "keep_end", 8, 5), Cut(25, (85, 0))),
    "fits exactly": ((4, 2, 6, 10, "keep_start"), Cut.nothing(2)),
    "one answer is cut": ((4, 2, 7, 10, "keep_start"), Cut(0, (0, 1))),
    "both answers are cut": ((8, 5, 3, 10, "keep_start"), Cut(0, (3, 1))),
    "one token of each is left": ((9, 5, 3, 10, "keep_start"), Cut(0, (4, 2))),
    "the prompt fills it": ((10, 5, 3, 10, "keep_start"), Cut.nothing(2, fits=False)),
    "keep_end, fits exactly": ((4, 2, 6, 10, "keep_end"), Cut.nothing(2)),
    "keep_end, the longer answer counts": ((8, 2, 5, 10, "keep_end"), Cut(3, (0, 0))),
    "keep_end, one prompt token stays": ((8, 2, 9, 10, "keep_end"), Cut(7, (0, 0))),
    "keep_end, then the answers": ((8, 11, 20, 10, "keep_end"), Cut(7, (2, 11))),
    "keep_end, a prompt of one token": ((1, 3, 12, 10, "keep_end"), Cut(0, (0, 3))),
}


@pytest.mark.parametrize(("arguments", "expected"), CASES.values(), ids=CASES.keys())
def test_cases_by_hand(arguments, expected):
    lengths, options = arguments[:3], arguments[3:]
    assert LengthLimits(*options).plan_cut(*lengths) == expected


lengths = st.integers(1, 40)


@given(lengths, lengths, lengths, st.integers(2, 50), st.sampled_from(["keep_start", "keep_end"]))
def test_the_rest_fits_and_nothing_is_cut_needlessly(prompt, chosen, rejected, limit, mode):
    cut = LengthLimits(limit, mode).plan_cut(prompt, chosen, rejected)
    if not cut.fits:
        assert mode == "keep_start"
        assert prompt >= limit
        return
    kept = prompt - cut.prompt
    assert kept >= 1
    longest = 0
    for length, removed in zip((chosen, rejected), cut.answers, strict=True):
        assert length - removed >= 1
        assert kept + length - removed <= limit
        longest = max(longest, kept + length - removed)
    if cut.prompt or any(cut.answers):
        assert longest == limit


limits = st.none() | st.integers(1, 40)


@given(lengths, lengths, lengths, st.none() | st.integers(2, 50), limits, limits)
def test_max_length_cuts_what_the_other_limits_leave(
    prompt, chosen, rejected, limit, prompt_limit, answer_limit
):
    """The plain form: cut the lists one limit after the other, as TRL did."""
    pair = [[*range(length)] for length in (prompt, chosen, rejected)]
    kept = [pair[0][-prompt_limit:] if prompt_limit else pair[0]]
    kept += [answer[:answer_limit] for answer in pair[1:]]
    cut = LengthLimits(limit, "keep_start", prompt_limit, answer_limit).plan_cut(*map(len, pair))
    assert cut.fits is (limit is None or len(kept[0]) < limit)
    if cut.fits:
        room = None if limit is None else limit - len(kept[0])
        assert list(cut.apply(*pair)) == [kept[0], kept[1][:room], kept[2][:room]]


@pytest.mark.parametrize("length", [1, 0, -5, 2.5, True, "512"])
def test_a_length_that_holds_no_pair_is_refused(length):
    with pytest.raises(ConfigError, match="max_length is"):
        LengthLimits(length)


@pytest.mark.parametrize("name", ["max_prompt_length", "max_completion_length"])
@pytest.mark.parametrize("length", [0, -5, 2.5, True, "512"])
def test_a_length_that_holds_no_token_is_refused(name, length):
    with pytest.raises(ConfigError, match=f"{name} is .*at least 1 or None"):
        LengthLimits(**{name: length})


def test_an_unknown_mode_is_refused():
    with pytest.raises(ConfigError, match="expected 'keep_start' or 'keep_end'"):
        LengthLimits(10, "keep_middle")


def test_limits_name_themselves_as_they_are_applied():
    assert str(LengthLimits(10)) == "max_length 10 (keep_start)"
    assert str(LengthLimits(max_prompt_length=4)) == "max_prompt_length 4"
    all_set = LengthLimits(10, "keep_end", 4, 8)
    assert str(all_set) == "max_prompt_length 4, max_completion_length 8, max_length 10 (keep_end)"
    assert all_set.names == "max_prompt_length and max_completion_length and max_length"
    assert (str(LengthLimits()), LengthLimits().names) == ("no limit", "")
