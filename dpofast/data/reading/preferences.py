"""Reads preference pairs from any source and brings them to the normal form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets

from dpofast.data.reading.bad_rows import check_strictness
from dpofast.data.reading.mappings import check_columns, check_roles
from dpofast.data.reading.normal_form import is_normal_form, normal_form, source_notes
from dpofast.data.reading.sources import read_records
from dpofast.data.reading.table import TableBuilder


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
    Returns:
        A Dataset in memory, in the normal form; nothing is written to disk.
    Raises:
        DataError: the source can't be used, or some rows can't. Names the file and the first ten
            such rows (counted from 0) or lines (counted from 1), and says what is wrong and what
            to do.
        ConfigError: `columns` or `roles` can't be used, such as a column that no format has; or
            both strict and skip_bad_rows are set.
    """
    check_strictness(strict, skip_bad_rows)
    mapping, role_names = check_columns(columns), check_roles(roles)
    again = is_normal_form(source)
    if again and not mapping and not role_names and not strict:
        return source
    builder = TableBuilder(strict, skip_bad_rows, mapping, role_names, again)
    records = read_records(source, split=split, name=name, config_name=config_name)
    table = builder.build(records, name or _name_of(source))
    notes = builder.notes()
    return normal_form(table, notes.merged(source_notes(source)) if again else notes)


def _name_of(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else "the dataset"
