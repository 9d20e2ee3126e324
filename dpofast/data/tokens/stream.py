"""Tokenises the pairs of a stream, some rows at a time."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import datasets
import pyarrow as pa

from dpofast.columns import ID_COLUMNS, PAIRED, REF_COLUMNS, WEIGHT_COLUMNS
from dpofast.data.reading.bad_rows import check_strictness
from dpofast.data.reading.normal_form import normal_form
from dpofast.data.reading.pair_stream import PairStream
from dpofast.data.reading.records import Record
from dpofast.data.reading.table import TableBuilder
from dpofast.data.tokens.outcome import OutcomeSums, is_kept, outcome_features
from dpofast.data.tokens.refusals import refuse_bad_rows
from dpofast.data.tokens.render_process import RowRenderer
from dpofast.data.tokens.report import PreparationReport
from dpofast.data.tokens.tokenize import TOKENISED_ROWS, RowTokenizer
from dpofast.data.tokens.truncate import LengthLimits
from dpofast.data.tokens.unused import SHAPED_ROWS, unused_parts, warn_of_missing_text

# Columns of the normal form that tokenised pairs keep.
_PASSED_ON = ("row", *REF_COLUMNS, *WEIGHT_COLUMNS)


@dataclass(frozen=True)
class TokenisedRows:
    """Some rows of a stream, tokenised.

    Attributes:
        first_row: rows of this pass over the stream that come before them.
        pairs: their pairs that training uses, as `tokenize_preferences` makes them.
        is_text: whether the pairs are text that isn't messages.
    """

    first_row: int
    pairs: datasets.Dataset
    is_text: bool = False


class TokenStream:
    """Reads and tokenises the pairs of a stream in order, as `tokenize_preferences` does a list's.

    Args:
        stream: the pairs.
        limits: the options that decide what is cut from a pair.
        tokenizer, strict, skip_bad_rows, name: as in `tokenize_preferences`.

    Attributes:
        epoch: how often the stream was read to its end.
        row: rows that were read of the present pass.
        ended: whether the present pass has no further rows.
    """

    def __init__(
        self,
        stream: PairStream,
        tokenizer: Any,
        *,
        limits: LengthLimits,
        strict: bool = False,
        skip_bad_rows: bool = False,
        name: str = "train",
    ) -> None:
        check_strictness(strict, skip_bad_rows)
        self.stream, self.name = stream, name
        self.limits, self.skip_bad_rows = limits, skip_bad_rows
        self._builder = TableBuilder(
            strict,
            skip_bad_rows,
            stream.columns,
            stream.roles,
            again=False,
            answer_pairs=stream.answer_pairs,
        )
        self._renderer = RowRenderer(tokenizer)
        self._tokenize = RowTokenizer(self._renderer, limits, strict, name)
        self._sums = OutcomeSums()
        self._ties = 0  # pairs that the equal scores of those rows leave unmade
        self._counted = 0  # rows of the first pass that are in the sums
        self._unused: dict[str, None] = {}  # what the template doesn't use, in the order of finding
        self._fields: set[str] = set()  # fields of messages that were looked at for this
        self._looks_for_text = True
        self.start()

    def start(self, epoch: int = 0, row: int = 0) -> None:
        """Go to a row, counted from 0, of the pass with this number."""
        self.epoch, self.row, self.ended = epoch, row, False
        self._records: Iterator[Record] | None = None
        self._builder.start(row)

    def read(self, num_rows: int) -> TokenisedRows:
        """Tokenise the next rows. At the end of the pass there are fewer, and `ended` is set.

        Raises:
            DataError: rows can't be used or read, or the stream has no row at all.
        """
        if self._records is None:
            self._records = self.stream.records(self.epoch, self.row)
        first = self.row
        records = list(itertools.islice(self._records, num_rows))
        self.row += len(records)
        self.ended = len(records) < num_rows
        self._builder.take_ranked(records)
        ties = self._builder.ties
        table = self._builder.read(records, self.stream.name, self.ended)
        if table is None or not len(table):
            return TokenisedRows(first, datasets.Dataset(_no_pairs()))
        rows = normal_form(table, replace(self._builder.notes(), unused_columns=()))
        with contextlib.closing(self._renderer):
            outcomes = self._outcomes(rows)
            if not self.skip_bad_rows:
                refuse_bad_rows(self.name, outcomes)
            if self.epoch == 0 and first >= self._counted:
                self._counted = self.row
                self._ties += self._builder.ties - ties
                self._sums.add(outcomes)
                self._look_at(rows)
        passed_on = [c for c in _PASSED_ON if c in table.column_names]
        kept = outcomes.filter(is_kept(outcomes)).select([*ID_COLUMNS, *passed_on])
        is_text = rows.features.get("prompt") == datasets.Value("string")
        return TokenisedRows(first, datasets.Dataset(kept), is_text)

    def report(self) -> PreparationReport:
        """What became of the rows that were read, each counted once, however often it is read."""
        notes = self._builder.notes()
        unused = (*notes.unused_columns, *self._unused)
        report = self._sums.report(self.name, self.limits, unused, notes.nulls_left_out)
        return replace(report, ties=self._ties)

    def _outcomes(self, rows: datasets.Dataset) -> pa.Table:
        """The table of outcomes, and the columns that are passed on."""
        parts = [
            datasets.Dataset.from_dict(
                self._tokenize(rows[start : start + TOKENISED_ROWS]),
                features=datasets.Features(outcome_features(PAIRED)),
            ).with_format("arrow")[:]
            for start in range(0, len(rows), TOKENISED_ROWS)
        ]
        outcomes = pa.concat_tables(parts)
        given = rows.with_format("arrow")[:]
        for column in _PASSED_ON:
            if column in given.column_names:
                outcomes = outcomes.append_column(column, given[column])
        return outcomes

    def _look_at(self, rows: datasets.Dataset) -> None:
        """Find what the template doesn't use, and warn of text that it leaves out."""
        if self._looks_for_text:
            warned = warn_of_missing_text(rows, self._renderer, self.name)
            self._looks_for_text = not warned and self.row < SHAPED_ROWS
        notes = self._builder.notes()
        new = tuple(name for name in notes.message_fields if name not in self._fields)
        self._fields.update(new)
        seen = normal_form(
            rows.with_format("arrow")[:], replace(notes, unused_columns=(), message_fields=new)
        )
        self._unused |= dict.fromkeys(unused_parts(seen, self._renderer))


def _no_pairs() -> pa.Table:
    ids = pa.list_(pa.int32())
    return pa.schema({**dict.fromkeys(ID_COLUMNS, ids), "row": pa.int64()}).empty_table()
