"""Checks the weights and confidences of pairs against the loss, and says what they are."""

from __future__ import annotations

from typing import Any

import numpy as np

from dpofast.columns import WEIGHT_COLUMNS, kind_of_columns
from dpofast.data.packing.pair_columns import number_column
from dpofast.errors import DataError
from dpofast.model.place import place_of_pair
from dpofast_kernels import LOSSES, CoupledLoss, PreferenceLoss, ZeroLoss

WEIGHT, CONFIDENCE = WEIGHT_COLUMNS


def check_pair_weights(pairs: Any, name: str, loss: PreferenceLoss, *, is_whole: bool) -> None:
    """Refuse weights of which nothing is trained, and confidences that the loss can't use.

    Args:
        pairs: datasets.Dataset of tokenised pairs, or of tokenised unpaired rows.
        name: dataset name, used in messages.
        loss: the loss of the run.
        is_whole: whether the pairs are a whole dataset, and not a part of a stream.

    Raises:
        DataError: there are such weights or confidences.
    """
    weights = number_column(pairs, WEIGHT)
    if weights is not None and is_whole and not np.any(weights):
        noun = kind_of_columns(pairs.column_names).noun
        raise DataError(
            f"{name}: the weight of every {noun} is 0, so no {noun} counts; raise some of them, or "
            f"remove the column {WEIGHT!r}."
        )
    confidence = number_column(pairs, CONFIDENCE)
    if isinstance(loss, CoupledLoss):
        for column, values in ((WEIGHT, weights), (CONFIDENCE, confidence)):
            if values is not None:
                raise DataError(
                    f"{name}: {column}: the {' + '.join(loss.names)} loss couples pairs, so a pair "
                    "has no loss of its own; remove the column, or choose another loss."
                )
    if confidence is None:
        return
    unsmoothed = [part for part in loss.names if not _is_smoothed(part)]
    if unsmoothed:
        smoothed = ", ".join(filter(_is_smoothed, LOSSES))
        what = f"the {unsmoothed[0]} loss" if unsmoothed[0] in LOSSES else "loss_fn"
        what = "the sft loss" if isinstance(loss, ZeroLoss) else what
        raise DataError(
            f"{name}: {CONFIDENCE}: {what} has no smoothed form; remove the column, or choose a "
            f"loss_type that has one ({smoothed})."
        )
    if "robust" in loss.names:
        _refuse(pairs, name, confidence, confidence <= 0.5, "robust", "above 0.5")
    if "exo_pair" in loss.names:
        outside = (confidence <= 0.0) | (confidence >= 1.0)
        _refuse(pairs, name, confidence, outside, "exo_pair", "above 0 and below 1")


def describe_pair_weights(pairs: Any, name: str) -> str | None:
    """A line that says which numbers the columns hold; None if the pairs have none of them."""
    parts = []
    for column in WEIGHT_COLUMNS:
        values = number_column(pairs, column)
        if values is not None:
            low, high = np.nanmin(values), np.nanmax(values)
            parts.append(f"{column} from {low:g} to {high:g}, mean {np.nanmean(values):.4g}")
    noun = kind_of_columns(pairs.column_names).noun
    return f"{name}: the {noun}s have {'; and '.join(parts)}." if parts else None


def _is_smoothed(name: str) -> bool:
    return name in LOSSES and LOSSES[name].takes_label_smoothing


def _refuse(
    pairs: Any, name: str, values: np.ndarray, wrong: np.ndarray, loss: str, expected: str
) -> None:
    """Raise DataError if a confidence is out of the range of a loss; names the first row."""
    if wrong.any():
        pair = int(np.flatnonzero(wrong)[0])
        raise DataError(
            f"{place_of_pair(pairs, pair, name)}: {CONFIDENCE} is {values[pair]:g}, but the {loss} "
            f"loss needs one {expected}; mend the {int(wrong.sum()):,} such values, or choose "
            "another loss_type."
        )
