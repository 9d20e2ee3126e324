"""The common prefix ends at the first difference, whether or not a stride ends there."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpofast.data.prefix import STRIDE, common_prefix_length

few = st.text("ab", max_size=3)


@pytest.mark.parametrize("kind", [str, list, tuple])
@given(size=st.integers(0, 3 * STRIDE), first=few, second=few)
def test_it_ends_at_the_first_difference(kind, size, first, second):
    differs = [place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b]
    expected = size + (differs[0] if differs else min(len(first), len(second)))
    assert common_prefix_length(kind("a" * size + first), kind("a" * size + second)) == expected


def test_a_list_and_a_tuple_are_compared_item_by_item():
    assert common_prefix_length([1, 2, 3], (1, 2, 4)) == 2
