"""Metrics of each dataset in a mixture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dpofast.data.packing.batch import PackedPairs

# Metrics that each dataset of a mixture has of its own.
OF_EACH_SET = ("loss", "rewards/margins", "rewards/accuracies")


def set_metric_names(sets: Iterable[str]) -> list[str]:
    """Names of the metrics of these datasets."""
    return [f"{metric}/{name}" for name in sets for metric in OF_EACH_SET]


def set_metrics(
    batch: PackedPairs, values: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sum the metrics of a micro-batch's pairs for each dataset of a mixture.

    Args:
        batch: the micro-batch, on the device of the metrics.
        values: [P] for each name of OF_EACH_SET.

    Returns:
        Sums [] and numbers of pairs [], both by the names of `set_metric_names`. They are the same
        names on every rank, whatever pairs it has. Both are empty if there is only one dataset.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    if batch.sets is None:
        return sums, counts
    of_pairs = torch.stack([values[name].detach() for name in OF_EACH_SET])  # [3, P]
    for number, name in enumerate(batch.set_names):
        is_in = batch.sets == number  # [P]
        totals = torch.where(is_in, of_pairs, 0.0).sum(1)  # a NaN stays in its dataset
        names = set_metric_names([name])
        sums |= dict(zip(names, totals, strict=True))
        counts |= dict.fromkeys(names, is_in.sum())
    return sums, counts
