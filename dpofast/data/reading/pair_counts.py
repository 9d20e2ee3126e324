"""Counts the pairs of rows in the normal form that a run can train on."""

from __future__ import annotations

import datasets
import numpy as np

from dpofast.columns import ID_COLUMNS, PAIRS_COLUMN, kind_of_columns


def pair_counts(dataset: datasets.Dataset) -> np.ndarray:
    """The pairs of each row, [n] int64.

    A pair and an unpaired row count once, a ranked row as often as it has pairs. Rows that were
    left out when they were read, and pairs with equal answers, don't count.

    Args:
        dataset: pairs, unpaired rows or ranked rows, in the normal form or tokenised.
    """
    kind = kind_of_columns(dataset.column_names)
    is_tokenised = ID_COLUMNS[0] in dataset.column_names
    _, *columns = kind.id_columns if is_tokenised else kind.columns
    names = [*columns, PAIRS_COLUMN] if kind.many else columns
    # As Arrow; `dataset[name]` would read a column row by row.
    table = dataset.select_columns(names).with_format("arrow")[:]
    # A row that was left out has nulls in these columns.
    first, *others = (table[name].to_pylist() for name in names)
    if kind.many:
        counts = [
            sum(answers[one] != answers[two] for one, two in pairs or ())
            for answers, pairs in zip(first, others[0], strict=True)
        ]
    else:
        second = others[0] if others else [None] * len(first)
        counts = [int(one != other) for one, other in zip(first, second, strict=True)]
    return np.array(counts, dtype=np.int64)
