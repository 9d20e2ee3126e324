"""How far two sequences agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

STRIDE = 64  # items that are compared at once, out of Python's loop


def common_prefix_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Number of leading items that `first` and `second` have in common."""
    shorter, start = min(len(first), len(second)), 0
    while start < shorter and first[start : start + STRIDE] == second[start : start + STRIDE]:
        start += STRIDE
    for index in range(start, shorter):
        if first[index] != second[index]:
            return index
    return shorter
