"""Sums of metrics for each dataset of a mixture."""

from __future__ import annotations

from dataclasses import replace

import torch

from dpofast.data.packing.padded_rows import collate_padded
from dpofast.monitor.set_metrics import OF_EACH_SET, set_metric_names, set_metrics

VALUES = torch.tensor([[1.0, 2.0, 4.0], [1.0, float("nan"), 1.0], [0.0, 1.0, 1.0]])


def batch_of(sets):
    batch = collate_padded([([5], [6]), ([5], [7])] * len(sets))
    return replace(batch, sets=torch.tensor(sets, dtype=torch.int64), set_names=("a", "b", "c"))


def test_each_set_has_the_sums_and_numbers_of_its_pairs():
    values = dict(zip(OF_EACH_SET, VALUES, strict=True))
    sums, counts = set_metrics(batch_of([1, 0, 1]), values)
    assert list(sums) == list(counts) == set_metric_names(["a", "b", "c"])
    assert sums["loss/b"] == 5
    assert sums["rewards/margins/b"] == 2, "the NaN is in the other set"
    assert sums["rewards/margins/a"].isnan()
    assert sums["rewards/accuracies/a"] == 1
    assert (counts["loss/a"], counts["loss/b"], counts["loss/c"]) == (1, 2, 0)


def test_a_batch_without_pairs_has_the_same_names():
    sums, counts = set_metrics(batch_of([]), dict.fromkeys(OF_EACH_SET, torch.empty(0)))
    assert list(sums) == list(counts) == set_metric_names(["a", "b", "c"])
    assert not any(sums.values())
    assert not any(counts.values())


def test_a_single_dataset_has_none():
    assert set_metrics(collate_padded([([5], [6]), ([5], [7])]), {}) == ({}, {})
