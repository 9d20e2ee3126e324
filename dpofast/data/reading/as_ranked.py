"""Writes pairs as ranked rows with two answers each, for mixtures with ranked rows."""

from __future__ import annotations

from collections.abc import Mapping

import datasets
import numpy as np
import pyarrow as pa

from dpofast.columns import (
    PAIRED,
    PAIRS_COLUMN,
    PLACES_COLUMN,
    RANKED,
    TIES_COLUMN,
    kind_of_columns,
)
from dpofast.data.reading.normal_form import normal_form, source_notes
from dpofast.data.reading.records import BATCH_ROWS


def all_ranked(parts: Mapping[str, datasets.Dataset]) -> dict[str, datasets.Dataset]:
    """The same datasets, all of ranked rows if any of them is.

    Args:
        parts: pairs, or ranked rows, in the normal form, without reference log-probs.
    """
    kinds = {name: kind_of_columns(part.column_names) for name, part in parts.items()}
    if RANKED not in kinds.values():
        return dict(parts)
    return {
        name: as_ranked(part) if kinds[name] is PAIRED else part for name, part in parts.items()
    }


def as_ranked(pairs: datasets.Dataset) -> datasets.Dataset:
    """A ranked row for each pair: its chosen answer, then its rejected one.

    Args:
        pairs: pairs in the normal form, without reference log-probs.
    """
    table = pairs.with_format("arrow")[:]
    is_ids = PAIRED.id_columns[1] in table.column_names
    _, *answers = PAIRED.id_columns if is_ids else PAIRED.columns
    _, completions = RANKED.id_columns if is_ids else RANKED.columns
    # In batches, as the offsets of Arrow's texts are small.
    batches = [
        _joined(batch, answers, completions) for batch in table.to_batches(max_chunksize=BATCH_ROWS)
    ]
    return normal_form(pa.Table.from_batches(batches), source_notes(pairs))


def _joined(batch: pa.RecordBatch, answers: list[str], completions: str) -> pa.RecordBatch:
    """The rows of a batch with both answers in one column.

    Args:
        answers: columns of the chosen and the rejected answers.
        completions: the column to make.
    """
    size = len(batch)
    chosen, rejected = (batch.column(name) for name in answers)
    is_left_out = chosen.is_null()
    order = np.arange(2 * size).reshape(2, size).T.ravel()  # each chosen beside its rejected one
    both = pa.concat_arrays([chosen, rejected]).take(pa.array(order))
    ends = pa.array(np.arange(size + 1) * 2, pa.int32())
    own = pa.array([[[0, 1]]] * size, pa.list_(pa.list_(pa.int32())))
    places = pa.array(np.arange(2 * size) % 2, pa.int32())
    added = {
        completions: pa.ListArray.from_arrays(ends, both, mask=is_left_out),
        PAIRS_COLUMN: pa.compute.if_else(is_left_out, pa.scalar(None, own.type), own),
        TIES_COLUMN: pa.array(np.zeros(size), pa.int32()),
        PLACES_COLUMN: pa.ListArray.from_arrays(ends, places, mask=is_left_out),
    }
    kept = {
        name: column
        for name, column in zip(batch.schema.names, batch.columns, strict=True)
        if name not in answers
    }
    return pa.RecordBatch.from_pydict({**kept, **added})
