"""Reads Arrow's files and datasets in such a way that damage is an error.

Arrow trusts the offsets that it reads: Python values made of damaged ones are garbage, or end the
process. So each batch is validated before it is used. Files are read rather than mapped into
memory, because a mapped file that can't be read ends the process, too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow as pa

from dpofast.errors import DataError, one_line

# How a stream ends: a message of length 0. Writers before Arrow 0.15 leave out the first half.
_END, _OLD_END = b"\xff\xff\xff\xff\0\0\0\0", b"\0\0\0\0"
_FILE_FORMAT = b"ARROW1"
AGAIN = "the file is damaged or was cut short; write or download it again"


def checked(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Yield batches once all their offsets, and the UTF-8 of their texts, are known to be right.

    Raises:
        pyarrow.ArrowInvalid: they aren't.
    """
    for batch in batches:
        batch.validate(full=True)
        yield batch


def arrow_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Yield the batches of a file in Arrow's file format or in its streaming format.

    Raises:
        pyarrow.ArrowException: the file is damaged.
        DataError: it ends too early.
    """
    with pa.OSFile(str(path)) as source:
        if source.read(len(_FILE_FORMAT)) == _FILE_FORMAT:
            file = pa.ipc.open_file(source)
            yield from checked(file.get_batch(i) for i in range(file.num_record_batches))
            return
        source.seek(0)
        yield from checked(iter(pa.ipc.open_stream(source)))
        _check_end(path, source)


def _check_end(path: str | Path, source: pa.NativeFile) -> None:
    """A stream that was cut between two messages can be read without an error."""
    read, size = source.tell(), source.size()
    source.seek(max(size - len(_END), 0))
    end = source.read()
    if read != size or not (end == _END or (end.endswith(_OLD_END) and end[:4] != _END[:4])):
        raise DataError(f"{path} doesn't end as a stream of Arrow does: {AGAIN}")


def check_dataset(dataset: datasets.Dataset, name: str) -> None:
    """Check a dataset's tables, and the ends of the files that they are mapped from.

    Args:
        dataset: dataset in memory or on disk; all of its rows are read, also those that a `select`
            has left out.
        name: its name, used in errors.

    Raises:
        DataError: some of it is damaged.
    """
    for entry in dataset.cache_files:
        path = entry["filename"]
        try:
            _check_mapped_end(path)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} can't be read ({one_line(error)}): {AGAIN}") from None
    try:
        dataset.data.validate(full=True)
        if dataset._indices is not None:
            dataset._indices.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        files = ", ".join(entry["filename"] for entry in dataset.cache_files)
        raise DataError(
            f"{name} can't be read{f' from {files}' if files else ''} ({one_line(error)}): {AGAIN}"
        ) from None


def _check_mapped_end(path: str) -> None:
    if not os.path.exists(path):  # the dataset has its mapping still
        return
    with pa.memory_map(path) as source:
        if source.read(len(_FILE_FORMAT)) == _FILE_FORMAT:
            return  # this format has its end checked when it is opened
        source.seek(0)
        for _ in pa.ipc.MessageReader.open_stream(source):
            pass
        _check_end(path, source)
