"""How many rows each dataset gives to a mixture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction


def largest_counts(
    available: Sequence[int], shares: Sequence[float], at_most: int | None = None
) -> list[int] | None:
    """The counts of the largest mixture that repeats no row.

    Each count is within one row of its share of the mixture: a dataset with the share s of a
    mixture of N rows gives floor(s N) or ceil(s N) rows, and at least one.

    Args:
        available: rows of each dataset.
        shares: a positive number for each dataset. They are divided by their sum.
        at_most: most rows of the mixture; None for no limit.

    Returns:
        Rows to take of each dataset; None if no mixture has a row of every dataset.
    """
    # As integers over one denominator, so that 0.7 is seven tenths and nothing is rounded.
    exact = [Fraction(str(share)) for share in shares]
    scale = math.lcm(*(share.denominator for share in exact))
    weights = [int(share * scale) for share in exact]
    whole = sum(weights)
    # A larger mixture would need more than all rows of some dataset.
    pairs = list(zip(available, weights, strict=True))
    limit = min(((rows + 1) * whole - 1) // weight for rows, weight in pairs)
    limit = min(limit, sum(available), sum(available) if at_most is None else at_most)
    for size in range(limit, len(pairs) - 1, -1):
        counts = _rounded(pairs, size, whole)
        if counts is not None:
            return counts
    return None


def _rounded(pairs: Sequence[tuple[int, int]], size: int, whole: int) -> list[int] | None:
    """Round each dataset's part of a mixture down or up, so that they sum to its size.

    Args:
        pairs: (available rows, weight) of each dataset.
        size: rows of the mixture.
        whole: the sum of the weights.

    Returns:
        The counts; None if a dataset has too few rows, or would give none.
    """
    parts = [divmod(weight * size, whole) for _, weight in pairs]
    counts = [count for count, _ in parts]
    missing = size - sum(counts)
    can_grow = [
        index
        for index, ((rows, _), (count, rest)) in enumerate(zip(pairs, parts, strict=True))
        if rest and count < rows
    ]
    # Datasets that would give nothing come first, then those that lost most by rounding down.
    can_grow.sort(key=lambda index: (counts[index] > 0, -parts[index][1], index))
    for index in can_grow[:missing]:
        counts[index] += 1
    fits = sum(counts) == size and min(counts) > 0
    within = all(count <= rows for count, (rows, _) in zip(counts, pairs, strict=True))
    return counts if fits and within else None
