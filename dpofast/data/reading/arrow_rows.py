"""Turns Arrow's rows into plain Python values, as they would be in a JSON file.

Arrow gives every struct the fields of all rows' structs, and fills those that a row doesn't have
with nulls. A field that is null in a struct is therefore left out. Columns of JSON, as `datasets`
keeps them, don't have this problem: their values are read as they were written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

Read = Callable[[Any], Any]


class ArrowRows:
    """Reads batches of Arrow.

    Attributes:
        nulls_left_out: whether a field of a struct was null so far, and was left out.
    """

    def __init__(self) -> None:
        self.nulls_left_out = False

    def read(self, table: pa.RecordBatch | pa.Table) -> Iterator[dict[str, Any]]:
        """Yield the rows of a batch; columns that are null stay, as None."""
        columns = {}
        for name, column in zip(table.schema.names, table.columns, strict=True):
            values = column.to_pylist()
            read = self._reader(column.type)
            columns[name] = values if read is None else [_unless_null(read, v) for v in values]
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))

    def _reader(self, kind: pa.DataType) -> Read | None:
        """Reads a value that isn't null from what `to_pylist` gives; None if it is right as it is.

        Args:
            kind: type of the value.
        """
        if isinstance(kind, pa.JsonType):
            return json.loads
        if pa.types.is_struct(kind):
            readers = {field.name: self._reader(field.type) for field in kind}
            return lambda value: self._read_struct(value, readers)
        if pa.types.is_map(kind):  # a list of (key, value)
            of_item = self._reader(kind.item_type) or _same
            return lambda value: {key: _unless_null(of_item, item) for key, item in value}
        if hasattr(kind, "value_type") and not pa.types.is_dictionary(kind):  # a list
            of_value = self._reader(kind.value_type)
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


def _unless_null(read: Read, value: Any) -> Any:
    return None if value is None else read(value)


def _same(value: Any) -> Any:
    return value
