"""The counts of a mixture: the largest one that has each share within one row."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpofast.data.reading.shares import largest_counts


def largest_by_search(available, shares):
    """Size of the largest mixture, by trying all counts; None if there is none."""
    exact = [Fraction(str(share)) for share in shares]
    exact = [share / sum(exact) for share in exact]
    sizes = [
        sum(counts)
        for counts in itertools.product(*(range(1, rows + 1) for rows in available))
        if all(abs(c - s * sum(counts)) < 1 for c, s in zip(counts, exact, strict=True))
    ]
    return max(sizes, default=None)


shares = st.one_of(st.sampled_from([0.1, 0.2, 0.3, 0.7, 1, 3]), st.floats(0.01, 100))
sets = st.lists(st.tuples(st.integers(1, 7), shares), min_size=1, max_size=4)


@given(sets)
def test_no_larger_mixture_has_the_shares(pairs):
    available, wanted = zip(*pairs, strict=True)
    counts = largest_counts(available, wanted)
    expected = largest_by_search(available, wanted)
    if counts is None:
        assert expected is None
        return
    assert sum(counts) == expected
    assert all(1 <= count <= rows for count, rows in zip(counts, available, strict=True))
    whole = sum(Fraction(str(share)) for share in wanted)
    for count, share in zip(counts, wanted, strict=True):
        assert abs(count - Fraction(str(share)) / whole * sum(counts)) < 1


@pytest.mark.parametrize(
    ("available", "wanted", "expected"),
    [
        ([1000, 200], [0.7, 0.3], [469, 200]),
        ([1000, 200], [7, 3], [469, 200]),
        ([10, 10], [0.5, 0.5], [10, 10]),
        ([5], [0.3], [5]),
        ([100, 100, 100], [0.98, 0.01, 0.01], [100, 2, 1]),
        ([3, 3, 3], [0.98, 0.01, 0.01], None),
        ([10**9, 10**9], [0.9, 0.1], [10**9, (10**9 + 8) // 9]),
    ],
)
def test_counts_worked_out_by_hand(available, wanted, expected):
    assert largest_counts(available, wanted) == expected


def test_a_limit_is_kept():
    assert largest_counts([1000, 1000], [0.75, 0.25], at_most=64) == [48, 16]
