"""Reads the rows of one data file: JSON, JSON lines, Parquet, Arrow or CSV."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from dpofast.data.reading.arrow_rows import ArrowRows
from dpofast.data.reading.records import BATCH_ROWS, Record, record_of
from dpofast.data.reading.splits import check_whole_file
from dpofast.errors import DataError, one_line


def read_file(path: Path, split: str | None) -> Iterator[Record]:
    """Yield the rows of a file in order.

    Args:
        path: a file with an ending from READERS.
        split: split that the user asked for; None takes whatever the file holds. Only a JSON file
            that is one object of lists, {"train": [...], ...}, can hold several.
    Raises:
        DataError: the file is broken or has no such split; names the line if the format has lines.
    """
    reader = READERS[data_suffix(path)]
    if reader is not _read_json:  # JSON can hold several splits, so its reader checks by itself
        check_whole_file(path, split)
    try:
        yield from reader(path, split)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8 and try again"
        ) from None
    except (pa.ArrowException, gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path} can't be read as {path.suffix[1:]}: {one_line(error)}") from None
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}") from None


def data_suffix(path: Path) -> str:
    """The ending of `path` that selects its reader; "" if it is not a data file."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    joined = "".join(suffixes)
    for suffix in (joined, suffixes[-1] if suffixes else ""):
        if suffix in READERS:
            return suffix
    return ""


def _open_text(path: Path) -> IO[str]:
    # utf-8-sig skips a byte order mark, which Windows programs put at the beginning.
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _read_json(path: Path, split: str | None) -> Iterator[Record]:
    """Read a JSON array, an object with one array per split, or one object per line."""
    with _open_text(path) as file:
        text = file.read()
    if text.lstrip()[:1] != "[" and _is_object_a_line(text):
        check_whole_file(path, split)
        yield from _read_json_lines(path, split)
        return
    data = _parse(text, path)
    del text  # a large file would be in memory twice
    if isinstance(data, dict):
        data = _rows_in_object(data, path, split)
    else:
        check_whole_file(path, split)
    if not isinstance(data, list):
        raise DataError(
            f"{path} holds {type(data).__name__}, expected an array of objects or one object a line"
        )
    for row, values in enumerate(data):
        yield record_of(str(path), row, None, values, "an object")


def _is_object_a_line(text: str) -> bool:
    """Whether a .json file has one object per line, judged by its first line that isn't empty."""
    line = text.lstrip().partition("\n")[0]
    try:
        return isinstance(json.loads(line), dict) and bool(text.strip()[len(line) :].strip())
    except (ValueError, RecursionError):
        # The line is no JSON value. Either it begins a pretty-printed object, or the file has one
        # object per line and this line is broken. The reader of lines then names it in its error.
        following = text.strip()[len(line) :].lstrip()[:1]
        return line.startswith("{") and line.rstrip().endswith("}") and following == "{"


def _rows_in_object(data: dict[str, Any], path: Path, split: str | None) -> Any:
    """The rows of a split, from a file that is one JSON object; the object may be the only row."""
    lists = {
        key: value
        for key, value in data.items()
        if isinstance(value, list) and all(isinstance(item, dict) for item in value)
    }
    wanted = split or "train"
    for key in (wanted, "data", "rows") if wanted == "train" else (wanted,):
        if key in lists:
            return lists[key]
    if "chosen" in data or "rejected" in data or "chosen_ids" in data:
        check_whole_file(path, split)
        return [data]
    found = ", ".join(data) or "nothing"
    raise DataError(
        f"{path} is one object without a list {wanted!r} (found: {found}); "
        "write an array of objects or one object a line"
    )


def _read_json_lines(path: Path, split: str | None) -> Iterator[Record]:
    row = 0
    with _open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _line_record(str(path), row, number, line)
                row += 1


def _line_record(source: str, row: int, number: int, line: str) -> Record:
    """The record of one line. A broken line is a bad row; those after it can still be read."""
    try:
        return record_of(source, row, number, json.loads(line), "an object")
    except json.JSONDecodeError as error:
        problem = f"broken JSON ({error.msg} at column {error.colno}); mend that line"
    except (ValueError, RecursionError) as error:
        problem = f"JSON that can't be read: {error}"
    return Record(source, row, number, {}, (), problem)


def _parse(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno} is broken JSON: {error.msg} at column {error.colno}; "
            "mend that line"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is JSON that can't be read: {error}") from None


def _read_parquet(path: Path, split: str | None) -> Iterator[Record]:
    with pa.parquet.ParquetFile(path) as file:
        yield from _from_batches(path, file.iter_batches(batch_size=BATCH_ROWS))


def _read_arrow(path: Path, split: str | None) -> Iterator[Record]:
    with pa.memory_map(str(path)) as source:
        try:
            file = pa.ipc.open_file(source)
            batches = (file.get_batch(i) for i in range(file.num_record_batches))
        except pa.ArrowInvalid:  # not the file format; `datasets` writes the streaming format
            source.seek(0)
            batches = iter(pa.ipc.open_stream(source))
        yield from _from_batches(path, batches)


def _read_csv(path: Path, split: str | None) -> Iterator[Record]:
    parse = pa.csv.ParseOptions(newlines_in_values=True)
    # Arrow refuses a row that is longer than a block, so a block must hold the longest answers.
    read = pa.csv.ReadOptions(block_size=64 << 20)
    # Open the file once for the names of its columns, so that all can be declared as strings.
    # Arrow would otherwise read an answer such as "42" or "true" as a number or a bool.
    with pa.csv.open_csv(path, read_options=read, parse_options=parse) as reader:
        names = reader.schema.names
    convert = pa.csv.ConvertOptions(
        column_types={name: pa.string() for name in names}, strings_can_be_null=False
    )
    with pa.csv.open_csv(
        path, read_options=read, parse_options=parse, convert_options=convert
    ) as reader:
        yield from _from_batches(path, iter(reader))


def _from_batches(path: Path, batches: Iterator[pa.RecordBatch]) -> Iterator[Record]:
    row, arrow = 0, ArrowRows()
    for batch in batches:
        columns = tuple(batch.schema.names)
        for start in range(0, batch.num_rows, BATCH_ROWS):
            for values in arrow.read(batch.slice(start, BATCH_ROWS)):
                nulls = arrow.nulls_left_out
                yield Record(str(path), row, None, values, columns, nulls_left_out=nulls)
                row += 1


Reader = Callable[[Path, str | None], Iterator[Record]]
READERS: dict[str, Reader] = {
    ".json": _read_json,
    ".json.gz": _read_json,
    ".jsonl": _read_json_lines,
    ".jsonl.gz": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".csv": _read_csv,
}
