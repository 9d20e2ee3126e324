"""Reads the rows of one data file: JSON, JSON lines, Parquet, Arrow or CSV."""

from __future__ import annotations

import contextlib
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from dpofast.data.reading.arrow_files import AGAIN, arrow_batches, checked
from dpofast.data.reading.arrow_rows import ArrowRows
from dpofast.data.reading.kinds import kind_of_row
from dpofast.data.reading.records import BATCH_ROWS, Record, record_of
from dpofast.data.reading.row_error import shown
from dpofast.data.reading.splits import check_whole_file
from dpofast.errors import DataError, one_line

_ENCODING = "utf-8-sig"  # skips a byte order mark, which Windows programs put at the beginning


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
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}, line {line} is not UTF-8 text (byte {error.start} of the file); save it as "
            "UTF-8 and try again"
        ) from None
    except (pa.ArrowException, OSError, zlib.error, EOFError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"{path} can't be read: {error.strerror or error}") from None
        # Arrow raises an OSError without a number if a block can't be decompressed.
        raise DataError(
            f"{path} can't be read as {path.suffix[1:]} ({one_line(error)}): {AGAIN}"
        ) from None


def data_suffix(path: Path) -> str:
    """The ending of `path` that selects its reader; "" if it is not a data file."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    joined = "".join(suffixes)
    for suffix in (joined, suffixes[-1] if suffixes else ""):
        if suffix in READERS:
            return suffix
    return ""


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _read_json(path: Path, split: str | None) -> Iterator[Record]:
    """Read a JSON array, an object with one array per split, or one object per line."""
    with _open(path) as file:
        data = file.read()
    no_text = None
    try:
        text = data.decode(_ENCODING)
    except UnicodeDecodeError as error:
        # In a file with one object per line, this is the problem of a line.
        no_text, text = error, data.decode(_ENCODING, errors="replace")
    del data  # a large file would be in memory twice
    if text.lstrip()[:1] != "[" and _is_object_a_line(text):
        check_whole_file(path, split)
        yield from _read_json_lines(path, split)
        return
    if no_text is not None:
        raise no_text
    content = _parse(text, path)
    del text
    if isinstance(content, dict):
        content = _rows_in_object(content, path, split)
    else:
        check_whole_file(path, split)
    if not isinstance(content, list):
        raise DataError(
            f"{path} holds {type(content).__name__}, expected an array of objects or one object a "
            "line"
        )
    for row, values in enumerate(content):
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
    if kind_of_row(data) is not None:
        check_whole_file(path, split)
        return [data]
    found = ", ".join(data) or "nothing"
    raise DataError(
        f"{path} is one object without a list {wanted!r} (found: {found}); "
        "write an array of objects or one object a line"
    )


def _read_json_lines(path: Path, split: str | None) -> Iterator[Record]:
    row = number = 0
    with _open(path) as file:
        for chunk in file:
            for line in chunk.splitlines():  # a line can also end with a carriage return
                number += 1
                if line.strip():
                    yield _line_record(str(path), row, number, line)
                    row += 1


def _line_record(source: str, row: int, number: int, line: bytes) -> Record:
    """The record of one line. A broken line is a bad row; those after it can still be read."""
    try:
        text = line.decode(_ENCODING if number == 1 else "utf-8")
        return record_of(source, row, number, json.loads(text), "an object")
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 text (byte {error.start} of the line); save it as UTF-8"
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
    # Only some writers give pages a checksum.
    with pa.parquet.ParquetFile(path, page_checksum_verification=True) as file:
        yield from _from_batches(path, checked(file.iter_batches(batch_size=BATCH_ROWS)))


def _read_arrow(path: Path, split: str | None) -> Iterator[Record]:
    yield from _from_batches(path, arrow_batches(path))


def _read_csv(path: Path, split: str | None) -> Iterator[Record]:
    # Arrow refuses a row that is longer than a block, so a block must hold the longest answers. It
    # numbers broken rows only if it reads without threads.
    read = pa.csv.ReadOptions(block_size=64 << 20, use_threads=False)
    problems: dict[int, str] = {}  # row from 0 -> what is wrong with it
    # Open the file once for the names of its columns, so that all can be declared as bytes. Arrow
    # would otherwise read an answer such as "42" or "true" as a number or a bool, and stop at a
    # cell that isn't UTF-8.
    with _without_tracebacks():
        reader = pa.csv.open_csv(path, read_options=read, parse_options=_csv_options({}))
    with reader:
        names = reader.schema.names
    convert = pa.csv.ConvertOptions(
        column_types={name: pa.binary() for name in names}, strings_can_be_null=False
    )
    row = 0
    parse = _csv_options(problems)
    with _without_tracebacks():
        reader = pa.csv.open_csv(
            path, read_options=read, parse_options=parse, convert_options=convert
        )
    with reader:
        while True:
            with _without_tracebacks():
                batch = next(reader, None)
            if batch is None:
                break
            for start in range(0, batch.num_rows, BATCH_ROWS):
                columns = [column.to_pylist() for column in batch.slice(start, BATCH_ROWS).columns]
                for cells in zip(*columns, strict=True):
                    while row in problems:
                        yield Record(str(path), row, None, {}, (), problems.pop(row))
                        row += 1
                    yield _csv_record(str(path), row, dict(zip(names, cells, strict=True)))
                    row += 1
    for row, problem in sorted(problems.items()):
        yield Record(str(path), row, None, {}, (), problem)


@contextlib.contextmanager
def _without_tracebacks() -> Iterator[None]:
    """Inside the `with` block, Arrow prints no traceback about a row that it can't show to `note`.

    That is one with a wrong number of cells that isn't UTF-8; an error that names it follows.
    """
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = hook


def _csv_options(problems: dict[int, str]) -> pa.csv.ParseOptions:
    """Options that note rows with too few or too many cells, by their number from 0."""

    def note(row: pa.csv.InvalidRow) -> str:
        # Arrow counts from 1, and the line with the names is the first.
        problems[(row.number or 0) - 2] = (
            f"the row has {row.actual_columns} cells, expected {row.expected_columns}: "
            f"{shown(row.text)}; put cells with commas, quotes or line breaks in quotes"
        )
        return "skip"

    return pa.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=note)


def _csv_record(source: str, row: int, cells: dict[str, bytes]) -> Record:
    try:
        values = {name: cell.decode() for name, cell in cells.items()}
    except UnicodeDecodeError:
        (name, *_) = [name for name, cell in cells.items() if not _is_utf8(cell)]
        problem = f"{name} is not UTF-8 text; save the file as UTF-8"
        return Record(source, row, None, {}, (), problem)
    return Record(source, row, None, values, tuple(values))


def _is_utf8(cell: bytes) -> bool:
    try:
        cell.decode()
    except UnicodeDecodeError:
        return False
    return True


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
