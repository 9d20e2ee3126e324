"""Reads how much a pair counts in the loss, and how sure it is that its chosen answer is better."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from dpofast.columns import WEIGHT_COLUMNS
from dpofast.data.reading.row_error import RowError, naming, shown

_EXPECTED = {
    "weight": "how much the pair counts in the loss, a number of at least 0",
    "label_confidence": "the probability that chosen is the better answer, a number from 0 to 1",
}
_LARGEST = {"weight": math.inf, "label_confidence": 1.0}


def pair_weights(row: Mapping[str, Any]) -> dict[str, float]:
    """What a row says in the columns WEIGHT_COLUMNS; a column that is null or empty is left out.

    Raises:
        RowError: a value is no finite number, or is out of range.
    """
    weights = {}
    for column in WEIGHT_COLUMNS:
        value = row.get(column)
        if value is None or (isinstance(value, str) and not value.strip()):  # in CSV files
            continue
        number = number_in(value)
        if not (math.isfinite(number) and 0.0 <= number <= _LARGEST[column]):
            raise RowError(
                f"{column} is {shown(value)}, but this column is {_EXPECTED[column]}; mend the "
                "value or, if your column means something else, remove it, rename it, or name "
                f"another one with {naming('columns', {column: 'your_column'})}"
            )
        weights[column] = number
    return weights


def refuse_half_weighted(found: Collection[str], expected: Collection[str]) -> None:
    """Refuse a row that has other columns of WEIGHT_COLUMNS than the first rows of its source.

    Args:
        found: columns of the row.
        expected: those of WEIGHT_COLUMNS that any of the first rows has.
    Raises:
        RowError: a column is missing, or is only in this row.
    """
    for column in WEIGHT_COLUMNS:
        if column in expected and column not in found:
            raise RowError(
                f"{column} is missing, but other rows have it; give it to every row, or remove the "
                "column"
            )
        if column in found and column not in expected:
            raise RowError(
                f"the row has {column}, but the first rows have none; give it to every row, or "
                "remove the column"
            )


def number_in(value: Any) -> float:
    """The number that a value is or says; NaN if it is none."""
    if isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
