"""Preference pairs that a run reads while it trains, and how their columns are named."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets

from dpofast.data.reading.answer_pairs import check_answer_pairs
from dpofast.data.reading.mappings import check_columns, check_roles
from dpofast.data.reading.records import Record
from dpofast.data.reading.row_stream import is_stream, picked_split, stream_records
from dpofast.data.reading.sources import read_records, stream_of


class PairStream:
    """A source of preference pairs that is read in order, as often as it is asked for.

    Args:
        source: an IterableDataset of `datasets` or PyTorch, or an IterableDatasetDict; or the path
            of a file or folder, or a hub name, as `load_preferences` takes them.
        columns, split, name, roles, config_name, answer_pairs: as in `load_preferences`. A row with
            many answers becomes pairs.

    Raises:
        DataError: there is no such source or split.
        ConfigError: `columns` or `roles` can't be used, such as a column that no format has; or
            `answer_pairs` has no such value.
    """

    def __init__(
        self,
        source: Any,
        *,
        columns: Mapping[str, str] | None = None,
        split: str = "train",
        name: str = "dataset",
        roles: Mapping[str, str] | None = None,
        config_name: str | None = None,
        answer_pairs: str | None = None,
    ) -> None:
        check_answer_pairs(answer_pairs)
        self.answer_pairs = answer_pairs
        self.source, self.split, self.config_name = source, split, config_name
        self.columns, self.roles = check_columns(columns), check_roles(roles)
        self.name = name
        if isinstance(source, datasets.IterableDatasetDict):
            self.source = picked_split(source, split, name)
        elif isinstance(source, str | Path):
            self.name = str(source)
            self.source = stream_of(str(source), split, config_name) or source

    def records(self, epoch: int = 0, skip: int = 0) -> Iterator[Record]:
        """Yield the rows of the source from its beginning.

        Args:
            epoch: how often the source was read to its end before.
            skip: rows to leave out at the beginning. They are read, but not looked at: a shuffled
                stream can't give a row without those before it.
        Raises:
            DataError: the source can't be read.
        """
        if is_stream(self.source):
            rows = stream_records(self.source, self.name, epoch)
        else:
            rows = read_records(
                self.source, split=self.split, name=self.name, config_name=self.config_name
            )
        return itertools.islice(rows, skip, None)
