"""Splits pairs into unpaired rows, for losses that take each answer by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from dpofast.columns import (
    ID_COLUMNS,
    LABEL_COLUMN,
    PAIRED,
    RANKED,
    REF_COLUMNS,
    UNPAIRED,
    WEIGHT_COLUMNS,
    kind_of_columns,
)
from dpofast.data.reading.normal_form import is_normal_form, normal_form, source_notes
from dpofast.data.reading.preferences import load_preferences
from dpofast.data.reading.reasons import IDENTICAL
from dpofast.errors import DataError

# Columns that say something about both answers of a pair together, or that the rows don't keep.
_DROPPED = (*REF_COLUMNS, WEIGHT_COLUMNS[1])


def split_pairs(dataset: Any, *, name: str | None = None) -> datasets.Dataset:
    """Make two unpaired rows of each pair: its chosen answer, desirable, and its rejected one.

    The rows keep the order of the pairs, and the number `row` of their pair. A pair with identical
    answers says nothing, so it is one row that is left out and reported, as is a row that was left
    out when it was read. Both rows have their pair's weight. Reference log-probs and
    label_confidence are left out; the report names them.

    Tokenised pairs, results of `tokenize_preferences`, keep their ids. Pairs that are split before
    get the same ids, unless both answers decide together on something: on the end of the prompt if
    a chat template renders it in two ways, on its cut under truncation_mode keep_end, or on whether
    the answers are identical after the cut.

    Args:
        dataset: result of `tokenize_preferences`, or pairs in any form that `load_preferences`
            reads.
        name: name of the dataset, used in errors.
    Returns:
        The unpaired rows: with prompt_ids, completion_ids, label and row, as `tokenize_unpaired`
        gives them, or in the normal form.
    Raises:
        DataError: the dataset can't be used, or its rows have many answers.
    """
    if _is_tokenised(dataset):
        return datasets.Dataset(_split(dataset.with_format("arrow")[:], ID_COLUMNS))
    pairs = load_preferences(dataset, name=name)
    if kind_of_columns(pairs.column_names) is RANKED:
        raise DataError(
            f"{name or 'the dataset'} holds rows with many answers (completions), and whether one "
            "of them is good by itself isn't said; write each answer as a row with completion and "
            "label, or the best and the worst as chosen and rejected"
        )
    notes = source_notes(pairs)
    dropped = tuple(column for column in _DROPPED if column in pairs.column_names)
    notes = replace(notes, unused_columns=(*notes.unused_columns, *dropped))
    is_ids = ID_COLUMNS[0] in pairs.column_names
    table = _split(pairs.with_format("arrow")[:], ID_COLUMNS if is_ids else PAIRED.columns)
    return normal_form(table, notes)


def _is_tokenised(dataset: Any) -> bool:
    """Whether this is a result of `tokenize_preferences`, which holds no row that is left out."""
    return (
        isinstance(dataset, datasets.Dataset)
        and not is_normal_form(dataset)
        and {*ID_COLUMNS, "row"} <= set(dataset.column_names)
    )


def _split(table: pa.Table, columns: tuple[str, ...]) -> pa.Table:
    """The table of the rows.

    Args:
        table: pairs.
        columns: their columns of prompt, chosen and rejected.
    """
    prompt, *answers = columns
    completion = (UNPAIRED.id_columns if prompt == ID_COLUMNS[0] else UNPAIRED.columns)[1]
    chosen, rejected = (table[column].to_pylist() for column in answers)
    # A row that was left out has nulls in both columns.
    is_same = np.array([one == other for one, other in zip(chosen, rejected, strict=True)], bool)
    others = [c for c in table.column_names if c not in (*answers, *_DROPPED)]
    halves = []
    for column, label in zip(answers, (True, False), strict=True):
        half = table.select(others).append_column(completion, table[column])
        labels = pa.array([label] * len(table), mask=is_same, type=pa.bool_())
        halves.append(half.append_column(LABEL_COLUMN, labels))
    rows = pa.concat_tables(halves)
    if is_same.any():
        rows = _left_out(rows, np.tile(is_same, 2), (prompt, completion))
    order = np.arange(2 * len(table)).reshape(2, -1).T  # [pairs, 2]: both rows of each pair
    taken = np.ones_like(order, dtype=bool)
    taken[:, 1] = ~is_same
    return rows.take(pa.array(order[taken]))


def _left_out(rows: pa.Table, at: np.ndarray, columns: tuple[str, ...]) -> pa.Table:
    """The rows without prompt and answer at these places, and with the reason."""
    mask = pa.array(at)
    for column in columns:
        values = rows[column].combine_chunks()
        empty = pa.nulls(len(rows), values.type)
        rows = rows.set_column(
            rows.column_names.index(column), column, pa.compute.if_else(mask, empty, values)
        )
    if "left_out" not in rows.column_names:
        rows = rows.append_column("left_out", pa.nulls(len(rows), pa.string()))
    index = rows.column_names.index("left_out")
    # Rows that were left out before keep their reason.
    reasons = pa.compute.coalesce(rows["left_out"], pa.compute.if_else(mask, IDENTICAL, None))
    return rows.set_column(index, "left_out", reasons)
