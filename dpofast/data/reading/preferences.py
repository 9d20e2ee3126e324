"""Reads pairs, ranked rows or unpaired rows from any source and brings them to the normal form."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets

from dpofast.columns import PAIRED, RANKED, UNPAIRED, RowKind
from dpofast.data.reading.answer_pairs import check_answer_pairs
from dpofast.data.reading.bad_rows import check_strictness
from dpofast.data.reading.kinds import kind_of_rows
from dpofast.data.reading.mappings import check_columns, check_roles
from dpofast.data.reading.normal_form import is_normal_form, normal_form, source_notes
from dpofast.data.reading.records import BATCH_ROWS, Record
from dpofast.data.reading.sources import read_records
from dpofast.data.reading.table import TableBuilder
from dpofast.errors import ConfigError


def load_preferences(
    source: Any,
    *,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    strict: bool = False,
    skip_bad_rows: bool = False,
    name: str | None = None,
    roles: Mapping[str, str] | None = None,
    config_name: str | None = None,
    answer_pairs: str | None = None,
) -> datasets.Dataset:
    """Read preference pairs from any source and format into the normal form.

    Args:
        source: path of a json, jsonl, parquet, arrow or csv file, or of a folder of such files; a
            hub name; a datasets.Dataset or DatasetDict; a list of dicts; an IterableDataset of
            `datasets` or PyTorch, which is read to its end.
        columns: column name here -> column name in the source.
        split: split of a hub dataset, a DatasetDict or a folder; a single file has only one.
        strict: refuse pairs whose answers are identical or empty. By default, identical answers are
            kept here, rows with an empty answer are marked as left out, and `tokenize_preferences`
            leaves out and reports both.
        skip_bad_rows: mark rows that can't be used as left out, instead of raising. Such rows are
            reported, too.
        name: name of a Dataset or a list, used in errors; files and hub datasets have their own.
        roles: role in the source -> role that the chat template knows. Without it, messages with
            role and content keep the roles that the source gives them.
        config_name: configuration of a hub dataset.
        answer_pairs: which answers of a row with many answers make a pair: "all" with different
            scores, "best_worst", "adjacent" scores, or those that the row's preferences have
            "given". None is "given" for rows with preferences and "all" for others.
    Returns:
        A Dataset in memory, in the normal form: a row for each pair, or, if the source's rows have
        many answers, a row for each prompt. Nothing is written to disk.
    Raises:
        DataError: the source can't be used, or some rows can't. Names the file and the first ten
            such rows (counted from 0) or lines (counted from 1), and says what is wrong and what
            to do.
        ConfigError: `columns` or `roles` can't be used, such as a column that no format has; or
            both strict and skip_bad_rows are set.
    """
    reading = _Reading(PAIRED, columns, roles, strict, skip_bad_rows, answer_pairs)
    return reading.load(source, split, name, config_name)


def load_unpaired(
    source: Any,
    *,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    strict: bool = False,
    skip_bad_rows: bool = False,
    name: str | None = None,
    roles: Mapping[str, str] | None = None,
    config_name: str | None = None,
) -> datasets.Dataset:
    """Read unpaired rows, each with one answer and a label, from any source into the normal form.

    Args:
        source, columns, split, strict, skip_bad_rows, name, roles, config_name: as in
            `load_preferences`; strict refuses rows with an empty answer.
    Returns:
        A Dataset in memory, in the normal form: prompt and completion, as text or as messages (or
        prompt_ids and completion_ids), label (bool, true for a desirable answer), row, and what a
        pair can have besides. Nothing is written to disk.
    Raises:
        DataError, ConfigError: as in `load_preferences`; also if the source holds pairs, which
            `split_pairs` splits.
    """
    reading = _Reading(UNPAIRED, columns, roles, strict, skip_bad_rows)
    return reading.load(source, split, name, config_name)


def data_kind(
    source: Any,
    *,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    name: str | None = None,
    config_name: str | None = None,
) -> str:
    """Say what the rows of a source are, from the columns of the first ones.

    Args:
        source, columns, split, name, config_name: as in `load_preferences`.
    Returns:
        "paired", "unpaired" or "ranked" (many answers); "paired" if nothing tells, so that
        `load_preferences` says what is missing.
    Raises:
        DataError: the source can't be read.
        ConfigError: `columns` can't be used.
    """
    ours = check_columns(columns)
    records = read_records(source, split=split, name=name, config_name=config_name)
    return (_kind_of(itertools.islice(records, BATCH_ROWS), ours) or PAIRED).name


def _kind_of(records: Iterable[Record], columns: Mapping[str, str]) -> RowKind | None:
    """What the first rows of a source are; None if their columns don't say.

    Args:
        records: the rows.
        columns: column name here -> column name in the source.
    """
    theirs = set(columns.values())
    return kind_of_rows(
        {
            **{name: value for name, value in record.values.items() if name not in theirs},
            **{o: record.values[t] for o, t in columns.items() if t in record.values},
        }
        for record in records
    )


class _Reading:
    """How a source is read; see `load_preferences`."""

    def __init__(
        self,
        kind: RowKind,
        columns: Any,
        roles: Any,
        strict: bool,
        skip_bad_rows: bool,
        answer_pairs: str | None = None,
    ) -> None:
        check_strictness(strict, skip_bad_rows)
        check_answer_pairs(answer_pairs)
        self.kind, self.strict, self.skip_bad_rows = kind, strict, skip_bad_rows
        self.columns, self.roles = check_columns(columns), check_roles(roles)
        self.answer_pairs = answer_pairs

    def load(
        self, source: Any, split: str, name: str | None, config_name: str | None
    ) -> datasets.Dataset:
        """The rows of a source in the normal form."""
        kinds = (PAIRED, RANKED) if self.kind is PAIRED else (self.kind,)
        before = next((kind for kind in kinds if is_normal_form(source, kind)), None)
        again = before is not None
        if again:
            self._refuse_other_pairs(source, name)
            if not (self.columns or self.roles or self.strict):
                dataset: datasets.Dataset = source
                return dataset
        records = read_records(source, split=split, name=name, config_name=config_name)
        kind = before or self.kind
        if kind is PAIRED and not again:
            first = list(itertools.islice(records, BATCH_ROWS))
            kind = RANKED if _kind_of(first, self.columns) is RANKED else PAIRED
            records = itertools.chain(first, records)
        builder = TableBuilder(
            self.strict,
            self.skip_bad_rows,
            self.columns,
            self.roles,
            again,
            kind,
            self.answer_pairs,
        )
        table = builder.build(records, name or _name_of(source))
        notes = builder.notes()
        return normal_form(table, notes.merged(source_notes(source)) if again else notes)

    def _refuse_other_pairs(self, dataset: datasets.Dataset, name: str | None) -> None:
        """Refuse to make other pairs of rows whose pairs are made."""
        made = source_notes(dataset).answer_pairs
        if self.answer_pairs is not None and made and made != (self.answer_pairs,):
            raise ConfigError(
                f"answer_pairs is {self.answer_pairs}, but the pairs of {name or 'the dataset'} "
                f"were made with {' and '.join(made)}; give this option when the rows are read for "
                "the first time, to load_preferences."
            )


def _name_of(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else "the dataset"
