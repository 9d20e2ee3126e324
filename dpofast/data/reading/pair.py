"""A row under this package's names of columns, and the pair or other row read from it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dpofast.columns import PAIRED, PAIRS_COLUMN, RANKED, RowKind
from dpofast.data.reading.messages import is_empty_answer, same


@dataclass(frozen=True, slots=True)
class Pair:
    """One pair, one unpaired row or one ranked row in the normal form.

    Attributes:
        kind: type of the prompt and the answers: "text", "messages" or "ids".
        columns: names of the columns that the pair was read from, used in errors.
        values: column -> value, for all columns of the normal form except `row`. Messages are lists
            of dicts here.
        used: columns of the source that the pair was made from. All others didn't matter.
        row_kind: what it is.
        empty: name of an empty answer of a ranked row, for which this pair is left out.
    """

    kind: str
    columns: str
    values: dict[str, Any] = field(default_factory=dict)
    used: frozenset[str] = frozenset()
    row_kind: RowKind = PAIRED
    empty: str | None = None

    @property
    def identical(self) -> bool:
        """Whether the two answers of a pair are the same."""
        if self.row_kind is RANKED:
            answers = self.values[self._answer_columns[0]]
            return any(same(answers[one], answers[two]) for one, two in self.values[PAIRS_COLUMN])
        first, *others = (self.values[column] for column in self._answer_columns)
        return bool(others) and all(same(first, other) for other in others)

    @property
    def blank(self) -> str | None:
        """The column of the first answer without text and tool call; None if there is none."""
        if self.empty is not None or self.row_kind is RANKED:
            return self.empty
        for name, column in zip(self.row_kind.answers, self._answer_columns, strict=True):
            answer = self.values[column]
            if self.kind == "messages":
                empty = is_empty_answer(answer)
            else:
                empty = not (answer.strip() if self.kind == "text" else answer)
            if empty:
                return name
        return None

    @property
    def _answer_columns(self) -> tuple[str, ...]:
        return self.row_kind.id_columns[1:] if self.kind == "ids" else self.row_kind.answers


@dataclass(frozen=True, slots=True)
class Row:
    """The columns of one row, under the names that this package uses.

    Attributes:
        values: column -> value.
        names: column -> its name in an error, for columns that the source calls otherwise.
        sources: column -> columns of the source that its value is from, for the same columns.
        kind: whether the row holds a pair or is unpaired.
    """

    values: Mapping[str, Any]
    names: Mapping[str, str] = field(default_factory=dict)
    sources: Mapping[str, frozenset[str]] = field(default_factory=dict)
    kind: RowKind = PAIRED

    @property
    def answers(self) -> tuple[str, ...]:
        """Columns of the answers."""
        return self.kind.answers

    @property
    def answer_names(self) -> tuple[str, ...]:
        """The names of these columns in an error."""
        return tuple(map(self.name, self.answers))

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
