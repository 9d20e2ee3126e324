"""A row under this package's names of columns, and the pair that is read from it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dpofast.columns import ID_COLUMNS, PAIR_COLUMNS
from dpofast.data.reading.messages import is_empty_answer, same


@dataclass(frozen=True, slots=True)
class Pair:
    """One pair in the normal form.

    Attributes:
        kind: type of the prompt and the answers: "text", "messages" or "ids".
        columns: names of the columns that the pair was read from, used in errors.
        values: column -> value, for all columns of the normal form except `row`. Messages are lists
            of dicts here.
        used: columns of the source that the pair was made from. All others didn't matter.
    """

    kind: str
    columns: str
    values: dict[str, Any] = field(default_factory=dict)
    used: frozenset[str] = frozenset()

    @property
    def identical(self) -> bool:
        _, chosen, rejected = self._columns
        return same(self.values[chosen], self.values[rejected])

    @property
    def blank(self) -> str | None:
        """ "chosen" or "rejected" if that answer has no text and no tool call, otherwise None."""
        for name, column in zip(PAIR_COLUMNS[1:], self._columns[1:], strict=True):
            answer = self.values[column]
            if self.kind == "messages":
                empty = is_empty_answer(answer)
            else:
                empty = not (answer.strip() if self.kind == "text" else answer)
            if empty:
                return name
        return None

    @property
    def _columns(self) -> tuple[str, str, str]:
        return ID_COLUMNS if self.kind == "ids" else PAIR_COLUMNS


@dataclass(frozen=True, slots=True)
class Row:
    """The columns of one row, under the names that this package uses.

    Attributes:
        values: column -> value.
        names: column -> its name in an error, for columns that the source calls otherwise.
        sources: column -> columns of the source that its value is from, for the same columns.
    """

    values: Mapping[str, Any]
    names: Mapping[str, str] = field(default_factory=dict)
    sources: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def __contains__(self, column: str) -> bool:
        return column in self.values

    def get(self, column: str) -> Any:
        return self.values.get(column)

    def name(self, column: str) -> str:
        return self.names.get(column, column)

    def listed(self, *columns: str) -> str:
        """The source's names of these columns, without repetitions."""
        return ", ".join(
            dict.fromkeys(re.split(r"[.\[]", self.name(column))[0] for column in columns)
        )

    def used(self, *columns: str) -> frozenset[str]:
        """The columns of the source that these columns are from."""
        return frozenset().union(*(self.sources.get(c, frozenset({c})) for c in columns))
