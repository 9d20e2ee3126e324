"""The rows of a stream: a dataset without a length, which is read in order and never held whole."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetsError

from dpofast.data.reading.arrow_rows import RowNulls
from dpofast.data.reading.records import Record, record_of
from dpofast.errors import DataError, one_line


def is_stream(source: Any) -> bool:
    """Whether `source` is an IterableDataset of `datasets` or PyTorch, or a dict of splits."""
    if isinstance(source, datasets.IterableDataset | datasets.IterableDatasetDict):
        return True
    torch = sys.modules.get("torch")  # whoever made such a dataset has imported it
    return torch is not None and isinstance(source, torch.utils.data.IterableDataset)


def stream_records(stream: Any, name: str, epoch: int = 0) -> Iterator[Record]:
    """Yield the rows of a stream from its beginning.

    Args:
        stream: an IterableDataset of `datasets` or PyTorch.
        name: name of the stream, used in errors.
        epoch: how often the stream was read to its end before. A shuffled one gives its rows in
            another order each time.
    Raises:
        DataError: the rows can't be read.
    """
    row = 0
    # A local name: a stream that isn't read to its end is closed when the process ends, and by then
    # the module's names may be gone.
    broken = (OSError, EOFError, zlib.error, DatasetsError, pa.ArrowException)
    try:
        if not isinstance(stream, datasets.IterableDataset):
            if callable(getattr(stream, "set_epoch", None)):
                stream.set_epoch(epoch)
            for row, values in enumerate(stream):
                # A copy, as rows are read ahead, and a stream may fill the same dict each time.
                own = dict(values) if isinstance(values, Mapping) else values
                yield record_of(name, row, None, own, "a dict of columns")
            return
        stream = _at_epoch(stream, epoch)
        nulls = _nulls_of(stream)
        for row, values in enumerate(stream):
            found = dict(values) if nulls is None else nulls.left_out(values)
            left_out = nulls is not None and nulls.found
            yield Record(name, row, None, found, tuple(found), nulls_left_out=left_out)
    except broken as error:
        raise DataError(
            f"{name} can't be read beyond row {row} ({type(error).__name__}: {one_line(error)})"
        ) from error


def _at_epoch(stream: datasets.IterableDataset, epoch: int) -> datasets.IterableDataset:
    """The same stream at its beginning, as plain Python values, in the order of an epoch."""
    # The user's own object keeps its epoch. A new one has no format, whatever was set.
    again = stream.with_format(None)
    again.set_epoch(epoch)
    start = getattr(stream, "_starting_state_dict", None)
    if start is not None:  # the user has loaded a state, which counts for the epoch it was made in
        again.load_state_dict(start)
    return again


def _nulls_of(stream: datasets.IterableDataset) -> RowNulls | None:
    """Says which nulls to leave out; None for rows that never were in Arrow.

    Arrow fills structs up with nulls, which nobody can tell from nulls that are meant.
    """
    if stream.features is not None:
        return RowNulls(stream.features.arrow_schema)
    return RowNulls(None) if _comes_from_arrow(getattr(stream, "_ex_iterable", None)) else None


def _comes_from_arrow(part: Any) -> bool:
    """Whether any source below a part of a stream gives Arrow tables, or can't be looked into."""
    below = getattr(part, "ex_iterable", None) or getattr(part, "ex_iterables", None)
    if below is None:
        return getattr(part, "iter_arrow", True) is not None
    parts: Iterable[Any] = below if isinstance(below, list | tuple) else [below]
    return any(map(_comes_from_arrow, parts))


def picked_split(splits: Mapping[str, Any], split: str, name: str) -> Any:
    """A split of a DatasetDict or an IterableDatasetDict.

    Raises:
        DataError: there is no such split.
    """
    if split not in splits:
        raise DataError(
            f"{name} has no split {split!r} (found: {', '.join(splits) or 'none'}); "
            "name one of these (dataset_train_split and dataset_test_split on the command line, "
            "split in load_preferences), or give that split by itself"
        )
    return splits[split]
