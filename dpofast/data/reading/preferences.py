"""Brings preference pairs of any format to the normal form, a `datasets.Dataset`.

The normal form has these columns:

- prompt, chosen and rejected: all text, or all lists of messages. A message has role and content,
  and `extra` if it has more fields: those fields as JSON.
- prompt_ids, chosen_ids and rejected_ids in their place, if the source is tokenised already.
- row: the row's index in the source, counted from 0.
- If the source has them: tools and chat_template_kwargs, as JSON; ref_chosen_logps and
  ref_rejected_logps, in nats; and plain_prompt, the prompt of an instruction row for tokenizers
  without a chat template.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

import datasets
import pyarrow as pa

from dpofast.columns import ID_COLUMNS, PAIR_COLUMNS, REF_COLUMNS
from dpofast.data.reading.formats import COLUMNS, Pair, read_pair
from dpofast.data.reading.records import BATCH_ROWS, Record
from dpofast.data.reading.row_error import STRICT_REMEDY, RowError
from dpofast.data.reading.sources import read_records
from dpofast.errors import ConfigError, DataError

# A Dataset with this description is in the normal form. Selecting rows keeps the description.
_DESCRIPTION = "Preference pairs in dpofast's normal form, version 1."

_MESSAGE = {"role": pa.string(), "content": pa.string()}
_MESSAGES = pa.list_(pa.struct({**_MESSAGE, "extra": pa.string()}))
_PAIR_TYPES = {
    "text": dict.fromkeys(PAIR_COLUMNS, pa.string()),
    "messages": dict.fromkeys(PAIR_COLUMNS, _MESSAGES),
    "ids": dict.fromkeys(ID_COLUMNS, pa.list_(pa.int32())),
}
_OPTIONAL_TYPES = {
    "tools": pa.string(),
    "chat_template_kwargs": pa.string(),
    "plain_prompt": pa.string(),
    "source": pa.string(),
    **dict.fromkeys(REF_COLUMNS, pa.float64()),
}


def load_preferences(
    source: Any,
    *,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    strict: bool = False,
    name: str | None = None,
    roles: Mapping[str, str] | None = None,
    config_name: str | None = None,
) -> datasets.Dataset:
    """Read preference pairs from any source and format into the normal form.

    Args:
        source: path of a json, jsonl, parquet, arrow or csv file, or of a folder of such files; a
            hub name; a datasets.Dataset or DatasetDict; a list of dicts.
        columns: column name here -> column name in the source.
        split: split of a hub dataset, a DatasetDict or a folder; a single file has only one.
        strict: refuse pairs with identical answers. By default they are kept here, and
            `tokenize_preferences` reports them and leaves them out.
        name: name of a Dataset or a list, used in errors; files and hub datasets have their own.
        roles: role in the source -> system, user, assistant or tool.
        config_name: configuration of a hub dataset.
    Returns:
        A Dataset in memory, in the normal form; nothing is written to disk.
    Raises:
        DataError: the source or a row can't be used. Names the file and the row (counted from 0)
            or line (counted from 1), says what is wrong and what to do.
        ConfigError: `columns` names a column that no format has.
    """
    if is_normal_form(source) and not columns and not roles and not strict:
        return source
    mapping = _check_columns(columns or {})
    records = read_records(source, split=split, name=name, config_name=config_name)
    table = _TableBuilder(strict, mapping, roles or {}).build(records)
    if table is None:
        raise DataError(f"{name or _name_of(source)} holds no rows; give it at least one pair")
    return datasets.Dataset(table, info=datasets.DatasetInfo(description=_DESCRIPTION))


def is_normal_form(source: Any) -> bool:
    """Whether `source` is a result of `load_preferences`, or a selection of its rows."""
    if not isinstance(source, datasets.Dataset) or source.info.description != _DESCRIPTION:
        return False
    # `map` keeps the description as well, so the columns have to be right, too.
    names = set(source.column_names)
    known = {"row", *_OPTIONAL_TYPES}
    return any(set(types) <= names <= known | set(types) for types in _PAIR_TYPES.values())


def _name_of(source: Any) -> str:
    return str(source) if not isinstance(source, datasets.Dataset | list | tuple) else "the dataset"


def _check_columns(columns: Mapping[str, str]) -> dict[str, str]:
    for ours, theirs in columns.items():
        if ours in COLUMNS:
            continue
        if theirs in COLUMNS:
            raise ConfigError(
                f"columns maps {ours!r} to {theirs!r}; write it the other way round: "
                f"{{{theirs!r}: {ours!r}}}"
            )
        near = difflib.get_close_matches(str(ours), COLUMNS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(COLUMNS)}"
        raise ConfigError(f"columns names {ours!r}, which no format has; {hint}")
    return dict(columns)


class _TableBuilder:
    """Builds an Arrow table in the normal form from the rows of one source.

    It works in batches, so the Python objects of a large file are never all in memory.

    Args:
        strict: refuse pairs with identical answers.
        columns: column name here -> column name in the source.
        roles: role in the source -> role that templates know.
    """

    def __init__(self, strict: bool, columns: dict[str, str], roles: Mapping[str, str]) -> None:
        self.strict, self.columns, self.roles = strict, columns, roles
        # Kind and format of the first pair, which all others must share.
        self.kind: str | None = None
        self.format = ""
        self.has_extra = False  # whether any message has the field `extra`
        self.used: set[str] = set()  # optional columns that any pair has

    def build(self, records: Iterator[Record]) -> pa.Table | None:
        """The table of all rows, or None if there are none."""
        batches, rows = [], []
        for count, record in enumerate(records):
            rows.append({"row": self._row_of(record, count), **self._read(record).values})
            if len(rows) == BATCH_ROWS:
                batches.append(pa.RecordBatch.from_pylist(rows, schema=self._schema()))
                rows = []
        if rows:
            batches.append(pa.RecordBatch.from_pylist(rows, schema=self._schema()))
        if not batches:
            return None
        # Every batch has all optional columns, because a later row could need any of them.
        table = pa.Table.from_batches(batches)
        table = table.drop_columns([name for name in _OPTIONAL_TYPES if name not in self.used])
        return table if self.has_extra else _without_extra(table)

    def _row_of(self, record: Record, count: int) -> int:
        # A dataset in the normal form has each row's original index, even after a selection. In
        # other sources a column `row` is taken for that index if it holds usable integers.
        row = record.values.get("row")
        return row if isinstance(row, int) and 0 <= row < 2**63 and row is not True else count

    def _read(self, record: Record) -> Pair:
        try:
            pair = read_pair(self._rename(record), record.columns, self.roles)
            self._check(pair)
        except RowError as error:
            raise DataError(f"{record.where}: {error}") from None
        self.used.update(name for name in pair.values if name in _OPTIONAL_TYPES)
        if pair.kind == "messages" and not self.has_extra:
            self.has_extra = any("extra" in m for c in PAIR_COLUMNS for m in pair.values[c])
        return pair

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

    def _check(self, pair: Pair) -> None:
        if self.kind is None:
            self.kind, self.format = pair.kind, pair.columns
        if (pair.kind, pair.columns) != (self.kind, self.format):
            raise RowError(
                f"the row is {pair.kind} in {pair.columns}, but the rows before it are {self.kind} "
                f"in {self.format}; write all rows in one form"
            )
        if self.strict and pair.identical:
            raise RowError(f"chosen and rejected are identical; {STRICT_REMEDY}")

    def _schema(self) -> pa.Schema:
        assert self.kind is not None
        return pa.schema({"row": pa.int64(), **_PAIR_TYPES[self.kind], **_OPTIONAL_TYPES})


def _without_extra(table: pa.Table) -> pa.Table:
    """Drop the field `extra` from a table in which no message has it."""
    for index, name in enumerate(table.column_names):
        if table.column(name).type != _MESSAGES:
            continue
        chunks = []
        for chunk in table.column(name).chunks:
            fields = [chunk.values.field("role"), chunk.values.field("content")]
            messages = pa.StructArray.from_arrays(fields, names=list(_MESSAGE))
            chunks.append(pa.ListArray.from_arrays(chunk.offsets, messages))
        table = table.set_column(index, name, pa.chunked_array(chunks))
    return table
