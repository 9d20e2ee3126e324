"""A row of user data with its place in the source; every reader yields these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BATCH_ROWS = 1000  # rows that readers hold as Python objects at a time


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a source.

    Attributes:
        source: name of the file, hub dataset or dataset, used in errors.
        row: index in the source, counted from 0.
        line: line in the file, counted from 1; None if the format doesn't put one row on a line.
        values: the row's columns.
        columns: names of all columns in the source.
        problem: why the row can't be read; `values` are empty then.
        nulls_left_out: whether fields that were null in structs of Arrow have been left out, in
            this row or in one before it.
    """

    source: str
    row: int
    line: int | None
    values: Mapping[str, Any]
    columns: Sequence[str]
    problem: str | None = None
    nulls_left_out: bool = False

    @property
    def where(self) -> str:
        """The row's place, in words for an error message."""
        if self.line is not None:
            return f"{self.source}, line {self.line}"
        return place_of_row(self.source, self.row)


def place_of_row(source: str, row: int) -> str:
    """The place of a row, in words for an error message."""
    return f"{source}, row {row} (counted from 0)"


def record_of(source: str, row: int, line: int | None, values: Any, expected: str) -> Record:
    """The record of a row that was read as `values`, whatever type that is.

    Args:
        source, row, line: place of the row.
        values: the row's columns, if it is a mapping.
        expected: what the row should be, in words for an error message.
    """
    if isinstance(values, Mapping):
        return Record(source, row, line, values, tuple(values))
    problem = f"the row is {type(values).__name__}, expected {expected}"
    return Record(source, row, line, {}, (), problem)
