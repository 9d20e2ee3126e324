"""Cuts in cases checked by hand, and the rules that every cut keeps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpofast.data.tokens.truncate import Cut, check_truncation, plan_cut
from dpofast.errors import ConfigError

CASES = {
    "no limit": ((900, 50, 60, None, "keep_start"), Cut()),
    "fits exactly": ((4, 2, 6, 10, "keep_start"), Cut()),
    "one answer is cut": ((4, 2, 7, 10, "keep_start"), Cut(0, 0, 1)),
    "both answers are cut": ((8, 5, 3, 10, "keep_start"), Cut(0, 3, 1)),
    "one token of each is left": ((9, 5, 3, 10, "keep_start"), Cut(0, 4, 2)),
    "the prompt fills it": ((10, 5, 3, 10, "keep_start"), Cut(fits=False)),
    "keep_end, fits exactly": ((4, 2, 6, 10, "keep_end"), Cut()),
    "keep_end, the longer answer counts": ((8, 2, 5, 10, "keep_end"), Cut(3, 0, 0)),
    "keep_end, one prompt token stays": ((8, 2, 9, 10, "keep_end"), Cut(7, 0, 0)),
    "keep_end, then the answers": ((8, 11, 20, 10, "keep_end"), Cut(7, 2, 11)),
    "keep_end, a prompt of one token": ((1, 3, 12, 10, "keep_end"), Cut(0, 0, 3)),
}


@pytest.mark.parametrize(("arguments", "expected"), CASES.values(), ids=CASES.keys())
def test_cases_by_hand(arguments, expected):
    assert plan_cut(*arguments) == expected


lengths = st.integers(1, 40)


@given(lengths, lengths, lengths, st.integers(2, 50), st.sampled_from(["keep_start", "keep_end"]))
def test_the_rest_fits_and_nothing_is_cut_needlessly(prompt, chosen, rejected, limit, mode):
    cut = plan_cut(prompt, chosen, rejected, limit, mode)
    if not cut.fits:
        assert mode == "keep_start"
        assert prompt >= limit
        return
    kept = prompt - cut.prompt
    assert kept >= 1
    longest = 0
    for length, removed in ((chosen, cut.chosen), (rejected, cut.rejected)):
        assert length - removed >= 1
        assert kept + length - removed <= limit
        longest = max(longest, kept + length - removed)
    if cut.prompt or cut.chosen or cut.rejected:
        assert longest == limit


@pytest.mark.parametrize("length", [1, 0, -5, 2.5, True, "512"])
def test_a_length_that_holds_no_pair_is_refused(length):
    with pytest.raises(ConfigError, match="max_length is"):
        check_truncation(length, "keep_start")


def test_an_unknown_mode_is_refused():
    with pytest.raises(ConfigError, match="expected 'keep_start' or 'keep_end'"):
        check_truncation(10, "keep_middle")
