"""Turns Arrow's rows into plain Python values, as they would be in a JSON file.

Arrow gives every struct the fields of all rows' structs, and fills those that a row doesn't have
with nulls. A field that is null in a struct is therefore left out. Columns of JSON, as `datasets`
keeps them, don't have this problem: their values are read as they were written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow as pa

Read = Callable[[Any], Any]


class ArrowRows:
    """Reads batches of Arrow.

    Args:
        json_is_read: columns of JSON are values already, not the texts that Arrow holds.

    Attributes:
        nulls_left_out: whether a field of a struct was null so far, and was left out.
    """

    def __init__(self, json_is_read: bool = False) -> None:
        self.json_is_read = json_is_read
        self.nulls_left_out = False

    def read(self, table: pa.RecordBatch | pa.Table) -> Iterator[dict[str, Any]]:
        """Yield the rows of a batch; columns that are null stay, as None."""
        columns = {}
        for name, column in zip(table.schema.names, table.columns, strict=True):
            values = column.to_pylist()
            read = self.reader(column.type)
            columns[name] = values if read is None else [_unless_null(read, v) for v in values]
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))

    def reader(self, kind: pa.DataType) -> Read | None:
        """Reads a value that isn't null from what `to_pylist` gives; None if it is right as it is.

        Args:
            kind: type of the value.
        """
        if isinstance(kind, pa.JsonType):
            return None if self.json_is_read else json.loads
        if pa.types.is_struct(kind):
            readers = {field.name: self.reader(field.type) for field in kind}
            return lambda value: self._read_struct(value, readers)
        if pa.types.is_map(kind):  # a list of (key, value)
            of_item = self.reader(kind.item_type) or _same
            return lambda value: {key: _unless_null(of_item, item) for key, item in value}
        if hasattr(kind, "value_type") and not pa.types.is_dictionary(kind):  # a list
            of_value = self.reader(kind.value_type)
            if of_value is not None:
                return lambda value: [_unless_null(of_value, item) for item in value]
        return None

    def _read_struct(self, value: dict[str, Any], readers: dict[str, Read | None]) -> Any:
        fields = {}
        for name, field in value.items():
            if field is None:
                self.nulls_left_out = True
                continue
            read = readers[name]
            fields[name] = field if read is None else read(field)
        return fields


class RowNulls:
    """Leaves the nulls out of the structs of rows that came from Arrow as Python values.

    Args:
        schema: the columns of the rows; None if they aren't known. Then every dict is a struct.
    """

    def __init__(self, schema: pa.Schema | None) -> None:
        self._arrow = ArrowRows(json_is_read=True)
        self._readers: dict[str, Read | None] | None = None
        if schema is not None:
            self._readers = {field.name: self._arrow.reader(field.type) for field in schema}
        self._found = False

    @property
    def found(self) -> bool:
        """Whether a field of a struct was null so far, and was left out."""
        return self._found or self._arrow.nulls_left_out

    def left_out(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row without such fields; columns that are null stay, as None."""
        if self._readers is None:
            return {name: self._without(value) for name, value in row.items()}
        readers = ((name, value, self._readers.get(name)) for name, value in row.items())
        return {
            name: value if read is None else _unless_null(read, value)
            for name, value, read in readers
        }

    def _without(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            self._found = self._found or any(field is None for field in value.values())
            return {k: self._without(field) for k, field in value.items() if field is not None}
        return [self._without(item) for item in value] if isinstance(value, list) else value


def _unless_null(read: Read, value: Any) -> Any:
    return None if value is None else read(value)


def _same(value: Any) -> Any:
    return value
