"""A row with its place: what every reader hands on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a source and where it stands.

    Attributes:
        source: file, hub name or dataset, as errors call it.
        row: its index in `source`, counted from 0.
        line: its line in `source`, counted from 1, where the format has one row a line.
        values: the row; a JSON value of another type is handed on as it is.
        columns: names of all columns of the source.
    """

    source: str
    row: int
    line: int | None
    values: Mapping[str, Any]
    columns: Sequence[str]

    @property
    def where(self) -> str:
        if self.line is not None:
            return f"{self.source}, line {self.line}"
        return f"{self.source}, row {self.row} (counted from 0)"
