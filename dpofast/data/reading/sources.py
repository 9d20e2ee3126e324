"""Reads the rows of whatever source a user gives: file, folder, hub name, Dataset or list."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError

from dpofast.data.reading.arrow_files import check_dataset
from dpofast.data.reading.arrow_rows import ArrowRows
from dpofast.data.reading.files import READERS, data_suffix, read_file
from dpofast.data.reading.records import BATCH_ROWS, Record, record_of
from dpofast.data.reading.row_stream import is_stream, picked_split, stream_records
from dpofast.data.reading.splits import same_split, split_in_name
from dpofast.errors import DataError, one_line
from dpofast.spelling import nearest_name

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# JSON files that `datasets` writes next to the data.
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


def read_records(
    source: Any, *, split: str, name: str | None, config_name: str | None
) -> Iterator[Record]:
    """Yield the rows of a source in order.

    Args:
        source: path, hub name, list of dicts, datasets.Dataset or DatasetDict, or a stream, which
            is read to its end.
        split: split to read, if the source has splits.
        name: name of a Dataset or list, used in errors; None says "dataset" or "list".
        config_name: configuration of a hub dataset.
    Raises:
        DataError: the source doesn't exist or can't be read.
    """
    if isinstance(source, str | Path):
        return _from_name(str(source), split, config_name)
    if isinstance(source, datasets.DatasetDict | datasets.IterableDatasetDict):
        source = picked_split(source, split, name or f"the {type(source).__name__}")
    if is_stream(source):
        return stream_records(source, name or "dataset")
    if isinstance(source, Iterator):
        raise DataError(
            f"{name or 'the data'} is a {type(source).__name__}, which can be read only once; "
            "expected a list of its rows, or datasets.IterableDataset.from_generator(the function "
            "that makes it)"
        )
    if isinstance(source, datasets.Dataset):
        return _from_dataset(source, name or "dataset")
    if isinstance(source, Mapping) or not isinstance(source, Sequence):
        raise DataError(
            f"{name or 'the data'} is a {type(source).__name__}, expected a path, a hub name, "
            "a datasets.Dataset or a list of rows"
        )
    return _from_list(source, name or "list")


def _from_list(rows: Sequence[Any], name: str) -> Iterator[Record]:
    for row, values in enumerate(rows):
        yield record_of(name, row, None, values, "a dict of columns")


def _from_dataset(dataset: datasets.Dataset, name: str) -> Iterator[Record]:
    check_dataset(dataset, name)
    columns = tuple(dataset.column_names)
    row, arrow = 0, ArrowRows()
    # Read as Arrow, a dataset gives the same values as a file of its rows would.
    for table in dataset.with_format("arrow").iter(batch_size=BATCH_ROWS):
        for values in arrow.read(table):
            yield Record(name, row, None, values, columns, nulls_left_out=arrow.nulls_left_out)
            row += 1


def stream_of(source: str, split: str, config_name: str | None) -> Any:
    """A hub dataset as a stream; None if `source` is a file or folder, which is one already.

    Raises:
        DataError: there is neither.
    """
    if Path(source).expanduser().exists():
        return None
    _refuse_mistyped(source)
    return _load_hub(source, split, config_name, streaming=True)


def _from_name(source: str, split: str, config_name: str | None) -> Iterator[Record]:
    path = Path(source).expanduser()
    if path.is_dir():
        return _from_folder(path, split)
    if path.exists():
        if not data_suffix(path):
            raise DataError(
                f"{path} has an ending that can't be read; expected one of {', '.join(READERS)}"
            )
        return read_file(path, split)
    _refuse_mistyped(source)
    return _from_dataset(_load_hub(source, split, config_name), source)


def _refuse_mistyped(source: str) -> None:
    """Raise DataError if `source`, which is no path here, can't be a hub name either."""
    path = Path(source).expanduser()
    # A mistyped path must not become a request to the hub.
    is_path = source[:1] in "./~" or bool(data_suffix(path)) or "\\" in source
    if is_path or not _HUB_NAME.fullmatch(source):
        raise DataError(f"there is no file {source}{_nearest_file(path)}")


def _nearest_file(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f", nor the folder {folder}; check the path"
    names = sorted(other.name for other in folder.iterdir())
    # The same name with another ending, such as json for jsonl, is as good as a typo.
    same = (name for name in names if Path(name).stem == path.stem)
    near = nearest_name(path.name, names) or next(same, None)
    return f"; did you mean {folder / near}?" if near else "; check the path"


def _load_hub(source: str, split: str, config_name: str | None, streaming: bool = False) -> Any:
    try:
        return datasets.load_dataset(source, config_name, split=split, streaming=streaming)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(
            f"{source} is no file here, and split {split!r} of a hub dataset of that name can't be "
            f"loaded: {one_line(error)}"
        ) from None


def _from_folder(folder: Path, split: str) -> Iterator[Record]:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        yield from _from_saved(folder, split)
        return
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and data_suffix(path)
        and path.name not in _NOT_DATA
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not files:
        raise DataError(
            f"the folder {folder} holds no data file; expected one of {', '.join(READERS)}"
        )
    for path in _files_of_split(files, folder, split):
        yield from read_file(path, None)  # the file's name has decided the split


def _from_saved(folder: Path, split: str) -> Iterator[Record]:
    """Read a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # on damaged files, `datasets` raises almost anything
        raise DataError(
            f"the saved dataset {folder} can't be read ({type(error).__name__}: "
            f"{one_line(error)}): one of its files is damaged or missing; save or download it again"
        ) from None
    if isinstance(loaded, datasets.DatasetDict):
        loaded = picked_split(loaded, split, str(folder))
    return _from_dataset(loaded, str(folder))


def _files_of_split(files: list[Path], folder: Path, split: str) -> list[Path]:
    """The files whose names contain `split`; for "train", all files if no name contains a split."""
    splits = {path: split_in_name(path.relative_to(folder)) for path in files}
    named = sorted({found for found in splits.values() if found})
    if not named and split == "train":
        return files
    chosen = [path for path in files if same_split(splits[path], split)]
    if not chosen:
        raise DataError(
            f"the folder {folder} has no files of the split {split!r} "
            f"(found: {', '.join(named) or 'no split in any file name'}); name the file itself"
        )
    return chosen
