"""What tokenised pairs say besides their tokens: weights, confidences, and their dataset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dpofast.columns import SOURCE_COLUMN, WEIGHT_COLUMNS

# Endings of data files, which a short name leaves out.
_ENDINGS = (".gz", ".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".csv")


@dataclass(frozen=True)
class PairColumns:
    """The columns of n pairs that a micro-batch takes along; see PackedPairs.

    Attributes:
        weights: [n] fp64; None if all pairs count once.
        label_confidence: [n] fp64; None if no pair has one.
        sets: [n] int64, number of each pair's dataset in `set_names`; None if there is only one.
        set_names: short names of the datasets.
    """

    weights: np.ndarray | None = None
    label_confidence: np.ndarray | None = None
    sets: np.ndarray | None = None
    set_names: tuple[str, ...] = ()

    @classmethod
    def of(cls, pairs: Any, usual_confidence: float = 1.0) -> PairColumns:
        """Read the columns.

        Args:
            pairs: datasets.Dataset of tokenised pairs.
            usual_confidence: the confidence of pairs that have none, if others have one.
        """
        weights, confidence = (number_column(pairs, column) for column in WEIGHT_COLUMNS)
        if weights is not None:
            weights = np.where(np.isnan(weights), 1.0, weights)
        if confidence is not None:
            confidence = np.where(np.isnan(confidence), usual_confidence, confidence)
        sets, names = _sets_of(pairs)
        return cls(weights, confidence, sets, names)

    def of_batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """The fields of PackedPairs for these pairs."""
        columns = {
            "weights": self.weights,
            "label_confidence": self.label_confidence,
            "sets": self.sets,
        }
        picked = {
            name: None if values is None else torch.from_numpy(values[indices])
            for name, values in columns.items()
        }
        return {**picked, "set_names": self.set_names}


def number_column(pairs: Any, column: str) -> np.ndarray | None:
    """A column of numbers: [n] fp64, NaN for null; None without the column, or if all is null."""
    if column not in pairs.column_names:
        return None
    values: np.ndarray = _arrow(pairs, column).to_numpy().astype(np.float64)
    return None if np.isnan(values).all() else values


def set_names(pairs: Any) -> tuple[str, ...]:
    """Short names of the datasets in a mixture; empty if it has only one."""
    return _sets_of(pairs)[1]


def _sets_of(pairs: Any) -> tuple[np.ndarray | None, tuple[str, ...]]:
    if SOURCE_COLUMN not in pairs.column_names:
        return None, ()
    encoded = _arrow(pairs, SOURCE_COLUMN).combine_chunks().dictionary_encode()
    names = encoded.dictionary.to_pylist()
    if len(names) < 2:
        return None, ()
    return encoded.indices.to_numpy().astype(np.int64), short_names(names)


def short_names(names: Sequence[str]) -> tuple[str, ...]:
    """The last part of each path or hub name without its ending, where that tells them apart."""
    short = [_last_part(name) for name in names]
    counts = Counter(short)
    if any(count > 1 for count in counts.values()):
        return tuple(names)
    return tuple(short)


def _last_part(name: str) -> str:
    part = name.replace("\\", "/").rstrip("/").rpartition("/")[2]
    for ending in _ENDINGS:
        part = part.removesuffix(ending)
    return part or name


def _arrow(pairs: Any, column: str) -> Any:
    """A column in Arrow; `pairs[column]` would read it row by row."""
    return pairs.select_columns([column]).with_format("arrow")[:][column]
