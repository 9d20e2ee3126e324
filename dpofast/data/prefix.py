"""The common prefix of two sequences: of token ids, of characters or of messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Items compared by one slice comparison, which runs in C instead of in a Python loop.
STRIDE = 64


def common_prefix_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Number of leading items that `first` and `second` have in common."""
    shorter, start = min(len(first), len(second)), 0
    while start < shorter and first[start : start + STRIDE] == second[start : start + STRIDE]:
        start += STRIDE
    # The slices above are never equal for a list and a tuple; their items still can be.
    for index in range(start, shorter):
        if first[index] != second[index]:
            return index
    return shorter
