"""Rows of Arrow become the values that a JSON file would hold."""

from __future__ import annotations

import json

import pyarrow as pa

from dpofast.data.reading.arrow_rows import ArrowRows


def read(*rows):
    arrow = ArrowRows()
    return list(arrow.read(pa.Table.from_pylist(list(rows)))), arrow.nulls_left_out


def test_fields_of_other_rows_are_left_out():
    rows = [{"a": {"x": 1, "deep": {"y": 2}}}, {"a": {"deep": {"z": [{"u": 1}, {"v": 2}]}}}]
    assert read(*rows) == (rows, True)


def test_columns_and_items_of_lists_keep_their_nulls():
    rows = [{"a": [1, None], "b": None}, {"a": None, "b": "x"}]
    assert read(*rows) == (rows, False)


def test_empty_structs_and_missing_structs_stay_apart():
    rows = [{"a": [{"x": {"k": 1}}]}, {"a": [{"x": {}}]}, {"a": [{}]}, {"a": []}]
    assert read(*rows)[0] == rows


def test_maps_become_objects():
    column = pa.array(
        [[("a", {"x": None}), ("b", None)]], pa.map_(pa.string(), pa.struct({"x": pa.int8()}))
    )
    arrow = ArrowRows()
    assert list(arrow.read(pa.table({"m": column}))) == [{"m": {"a": {}, "b": None}}]


def test_json_keeps_order_nulls_and_numbers():
    values = [{"b": None, "a": [1, None, {"c": None}], "pi": 3.141592653589793, "big": 2**70}, None]
    text = pa.array([json.dumps(value) for value in values[:1]] + [None], pa.string())
    arrow = ArrowRows()
    rows = list(arrow.read(pa.table({"v": text.cast(pa.json_())})))
    assert rows == [{"v": value} for value in values]
    assert list(rows[0]["v"]) == ["b", "a", "pi", "big"]
    assert not arrow.nulls_left_out
