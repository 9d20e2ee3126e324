"""Builds the normal form from the rows of one source."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from dpofast.columns import (
    PAIRED,
    PAIRS_COLUMN,
    PLACES_COLUMN,
    RANKED,
    SOURCE_COLUMN,
    TIES_COLUMN,
    UNPAIRED,
    WEIGHT_COLUMNS,
    RowKind,
)
from dpofast.data.reading.bad_rows import BadRows
from dpofast.data.reading.formats import read_pairs
from dpofast.data.reading.kinds import kind_of_rows, refuse_other_kind
from dpofast.data.reading.messages import encode_messages
from dpofast.data.reading.normal_form import OPTIONAL_TYPES, SourceNotes, answer_types
from dpofast.data.reading.pair import Pair
from dpofast.data.reading.ranked import RankedReader
from dpofast.data.reading.reasons import BAD_ROW, EMPTY
from dpofast.data.reading.records import BATCH_ROWS, Record
from dpofast.data.reading.row_error import STRICT_REMEDY, RowError, empty_answer
from dpofast.data.reading.unpaired import read_unpaired
from dpofast.data.reading.weights import refuse_half_weighted
from dpofast.errors import DataError

_KNOWN_FIELDS = ("role", "content")  # fields that every template uses

Row = dict[str, Any]  # a row of the normal form, without columns that are null


class TableBuilder:
    """Builds an Arrow table in the normal form.

    It works in batches, so the Python objects of a large file are never all in memory.

    Args:
        strict: refuse pairs whose answers are identical or empty.
        skip_bad_rows: leave out rows that can't be used, instead of raising.
        columns: column name here -> column name in the source.
        roles: role in the source -> role that templates know.
        again: the source is in the normal form already.
        kind: what the rows are: PAIRED, UNPAIRED or RANKED.
        answer_pairs: which pairs ranked rows make, as in `load_preferences`.

    Attributes:
        ties: pairs of ranked rows that equal scores left unmade.
    """

    def __init__(
        self,
        strict: bool,
        skip_bad_rows: bool,
        columns: Mapping[str, str],
        roles: Mapping[str, str],
        again: bool,
        kind: RowKind = PAIRED,
        answer_pairs: str | None = None,
    ) -> None:
        self.strict, self.skip_bad_rows = strict, skip_bad_rows
        self.columns, self.roles, self.again = columns, roles, again
        self.kind = kind
        self.ties = 0
        self._ranked = RankedReader(answer_pairs, again, as_pairs=kind is PAIRED)
        self._source_kind = kind
        self._bad = BadRows()
        self._rows_read = 0
        self._form: tuple[str, str] | None = None  # kind and format that all pairs must share
        self._weighted: set[str] = set()  # those of WEIGHT_COLUMNS that all rows must have
        self._kind_without_pairs = "text"
        self._filled: dict[str, None] = {}  # columns of the source with a value, in their order
        of_ranked = (PAIRS_COLUMN, TIES_COLUMN, PLACES_COLUMN)
        self._used = {"row", *OPTIONAL_TYPES, *of_ranked} if again else {"row"}
        self._message_fields: dict[str, None] = {}  # fields of messages, in their order
        self._optional: set[str] = set()  # optional columns of the normal form that any row has
        self._nulls_left_out = False
        self._waiting: list[Row] = []  # rows whose kind, and so whose schema, isn't known yet

    def build(self, records: Iterator[Record], name: str) -> pa.Table:
        """The table of all rows.

        Args:
            records: the rows.
            name: name of the source, used in errors.
        Raises:
            DataError: the source has no rows, or rows that can't be used.
        """
        batches: list[pa.RecordBatch] = []
        while chunk := list(itertools.islice(records, BATCH_ROWS)):
            self._waiting += self._read_chunk(chunk)
            if self._bad.count == self._rows_read:
                # Hardly the fault of single rows. Reading on would only delay the error.
                raise self._bad.error(name, self._rows_read, self.strict)
            if self._form is not None:
                batches.append(self._batch())
        if not self._rows_read:
            raise DataError(f"{name} holds no rows; give it at least one {self.kind.noun}")
        if self._bad.count and not self.skip_bad_rows:
            raise self._bad.error(name, self._rows_read, self.strict)
        if self._waiting:
            batches.append(self._batch())
        # Every batch has all optional columns, because a later row could need any of them.
        return self._without_unused(pa.Table.from_batches(batches))

    def take_ranked(self, records: Sequence[Record]) -> None:
        """Read the rows as ranked ones, pair by pair, if the first of them are.

        Args:
            records: the first rows of a source that isn't read as a whole.
        """
        if kind_of_rows(record.values for record in self._renamed(records)) is RANKED:
            self._source_kind = RANKED

    def start(self, row: int) -> None:
        """Take the next row that `read` gets for this one of the source, counted from 0."""
        self._rows_read, self._waiting, self._bad = row, [], BadRows()

    def read(self, records: Sequence[Record], name: str, at_end: bool) -> pa.Table | None:
        """The table of the next rows of a source that isn't read as a whole.

        Args:
            records: the rows; the first ones decide which form all pairs must have.
            name: name of the source, used in errors.
            at_end: the source has no further rows.
        Returns:
            The rows of the normal form, also those that waited for the first pair; None while there
            is no pair.
        Raises:
            DataError: rows can't be used.
        """
        self._waiting += self._read_chunk(records, blanks_decide=False)
        # A whole source is refused at this point, too, even if bad rows are to be skipped.
        hopeless = self._rows_read >= BATCH_ROWS or at_end
        all_are_bad = self._form is None and self._bad.count == self._rows_read > 0
        if (self._bad.count and not self.skip_bad_rows) or (all_are_bad and hopeless):
            raise self._bad.error(name, self._rows_read, self.strict)
        if self._form is None and not at_end:
            return None
        return self._without_unused(pa.Table.from_batches([self._batch()]))

    def notes(self) -> SourceNotes:
        """What was seen in the source, once the table is built."""
        unused = tuple(column for column in self._filled if column not in self._used)
        fields = tuple(name for name in self._message_fields if name not in _KNOWN_FIELDS)
        return SourceNotes(unused, fields, self._nulls_left_out, tuple(self._ranked.made))

    def _read_chunk(self, records: Sequence[Record], blanks_decide: bool = True) -> list[Row]:
        """The rows of the normal form for some rows of the source.

        Args:
            records: the rows.
            blanks_decide: settle the form of all pairs even if all answers here are blank.
        """
        if not self._rows_read and records:
            refuse_other_kind(self._renamed(records), self._source_kind, records[0].source)
        read = [self._pairs(record) for record in records]
        if self._form is None:
            # Most of the first rows decide which form is right, not the very first row.
            pairs = [pair for each in read if isinstance(each, list) for pair in each]
            # A blank text says little about its form.
            telling = [pair for pair in pairs if pair.blank is None]
            pairs = telling or (pairs if blanks_decide else [])
            forms = Counter((pair.kind, pair.columns) for pair in pairs)
            self._form = max(forms, key=forms.__getitem__, default=None)
            self._weighted = {c for pair in pairs for c in WEIGHT_COLUMNS if c in pair.values}
        rows: list[Row] = []
        for record, result in zip(records, read, strict=True):
            number = self._number(record)
            self._rows_read += 1
            self._nulls_left_out = record.nulls_left_out
            try:
                rows += self._rows(record, result, number)
            except RowError as error:
                problem = f"{record.where}: {error}"
                self._bad.add(problem)
                rows.append(self._left_out(number, BAD_ROW, problem))
        return rows

    def _renamed(self, records: Sequence[Record]) -> Iterator[Record]:
        """The records whose columns can be renamed; reading the others raises an error again."""
        for record in records:
            with contextlib.suppress(RowError):
                yield replace(record, values=self._rename(record))

    def _pairs(self, record: Record) -> list[Pair] | RowError:
        """The pairs of a row, or what is wrong with it; no pairs if it was left out before."""
        try:
            if record.problem is not None:
                raise RowError(record.problem)
            if self._was_left_out(record.values):
                return []
            row = self._rename(record)
            pairs = self._read_row(row, record.columns)
        except RowError as error:
            return error
        self._filled |= _filled(row)
        return pairs

    def _read_row(self, row: Mapping[str, Any], found: Sequence[str]) -> list[Pair]:
        if self._source_kind is RANKED:
            return self._ranked(row, found, self.roles)
        read = read_unpaired if self._source_kind is UNPAIRED else read_pairs
        return read(row, found, self.roles)

    def _rows(self, record: Record, result: list[Pair] | RowError, number: int) -> list[Row]:
        """The rows of the normal form for one row of the source.

        Raises:
            RowError: the row can't be used.
        """
        if isinstance(result, RowError):
            raise result
        if not result:  # the row was left out when the source was read for the first time
            if self.strict or record.values.get("problem"):
                why = record.values.get("problem") or record.values["left_out"]
                raise RowError(f"the row was left out before: {why}")
            if self.kind.id_columns[0] in record.values:
                self._kind_without_pairs = "ids"
            kept = {name: record.values.get(name) for name in (SOURCE_COLUMN, TIES_COLUMN)}
            return [{**self._left_out(number, record.values["left_out"]), **kept}]
        return [self._row(record, pair, number) for pair in result]

    def _row(self, record: Record, pair: Pair, number: int) -> Row:
        ties = pair.values.get(TIES_COLUMN, 0)
        if pair.blank is not None:
            if self.strict:
                raise empty_answer(pair.blank)
            self._used |= pair.used
            self.ties += ties
            return {**self._left_out(number, EMPTY), TIES_COLUMN: ties}
        self._refuse_other_form(pair)
        if not self.again:  # a mixture may have them in some rows
            refuse_half_weighted(pair.values, self._weighted)
        if self.strict and pair.identical:
            which = "two answers of a pair" if self.kind is RANKED else "chosen and rejected"
            raise RowError(f"{which} are identical; {STRICT_REMEDY}")
        self._used |= pair.used
        self.ties += ties
        row = {"row": number, **pair.values}
        if pair.kind == "messages":
            self._encode(row)
        if self.again and record.values.get(SOURCE_COLUMN) is not None:
            row[SOURCE_COLUMN] = record.values[SOURCE_COLUMN]
        self._optional.update(column for column in row if column in OPTIONAL_TYPES)
        return row

    def _refuse_other_form(self, pair: Pair) -> None:
        assert self._form is not None
        kind, columns = self._form
        if (pair.kind, pair.columns) != self._form:
            raise RowError(
                f"the row is {pair.kind} in {pair.columns}, but the rows around it are {kind} in "
                f"{columns}; write all rows in one form"
            )

    def _encode(self, row: Row) -> None:
        """Store the messages of a row as the normal form has them."""
        prompt, *answers = self.kind.columns
        parts = {column: [row[column]] for column in (prompt, *answers)}
        if self.kind.many:
            parts.update({column: row[column] for column in answers})
        for column, values in parts.items():
            for message in itertools.chain.from_iterable(values):
                self._message_fields |= _filled(message)
            stored = [encode_messages(messages, column) for messages in values]
            row[column] = stored if self.kind.many and column != prompt else stored[0]

    def _left_out(self, number: int, reason: str, problem: str | None = None) -> Row:
        row = {"row": number, "left_out": reason, "problem": problem}
        self._optional.update(("left_out",) if problem is None else ("left_out", "problem"))
        return row

    def _number(self, record: Record) -> int:
        # A dataset in the normal form has each row's original index, even after a selection. In
        # other sources a column `row` is taken for that index if it holds usable integers.
        row = record.values.get("row")
        if isinstance(row, int) and not isinstance(row, bool) and 0 <= row < 2**63:
            return row
        return self._rows_read

    def _rename(self, record: Record) -> Mapping[str, Any]:
        if not self.columns:
            return record.values
        row = dict(record.values)
        for ours, theirs in self.columns.items():
            if theirs not in record.values:
                raise RowError(
                    f"there is no column {theirs!r}, which columns gives for {ours!r} "
                    f"(found: {', '.join(map(str, record.columns))})"
                )
        # First remove all, then add: two columns can swap their names.
        for theirs in self.columns.values():
            row.pop(theirs, None)
        row.update({ours: record.values[theirs] for ours, theirs in self.columns.items()})
        return row

    def _batch(self) -> pa.RecordBatch:
        """The rows that wait, which wait no longer."""
        waiting, self._waiting = self._waiting, []
        return pa.RecordBatch.from_pylist(waiting, schema=self._schema())

    def _without_unused(self, table: pa.Table) -> pa.Table:
        """The table without the optional columns that no row has had so far."""
        return table.drop_columns([c for c in OPTIONAL_TYPES if c not in self._optional])

    def _schema(self) -> pa.Schema:
        # Without any pair, all columns are null, and only their names matter.
        kind = self._form[0] if self._form else self._kind_without_pairs
        types = answer_types(self.kind)[kind]
        return pa.schema({"row": pa.int64(), **types, **OPTIONAL_TYPES})

    def _was_left_out(self, row: Mapping[str, Any]) -> bool:
        """Whether a row was left out when its source was read for the first time."""
        columns = (*self.kind.answers, self.kind.id_columns[1])
        return isinstance(row.get("left_out"), str) and all(row.get(c) is None for c in columns)


def _filled(fields: Mapping[str, Any]) -> dict[str, None]:
    """The names of the fields that hold something, in their order."""
    return {
        name: None
        for name, value in fields.items()
        if value is not None and not (isinstance(value, str | list | tuple | dict) and not value)
    }
