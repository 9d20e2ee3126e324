"""Means of metrics over batches and ranks of different sizes."""

from __future__ import annotations

import pytest
import torch

from dpofast.monitor.metrics import MetricSums


def test_means_are_over_pairs_not_over_batches():
    sums = MetricSums()
    sums.add({"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor(6.0)}, num_pairs=3)
    sums.add({"a": torch.tensor([10.0]), "b": torch.tensor(2.0)}, num_pairs=1)
    means = sums.means(lambda vector: vector, torch.device("cpu"))
    assert means == {"a": pytest.approx(4.0), "b": pytest.approx(2.0)}
    assert sums.means(lambda vector: vector, torch.device("cpu")) == {}


def test_ranks_are_added_up_and_a_rank_without_pairs_counts_nothing():
    sums, other = MetricSums(), torch.tensor([20.0, 2.0], dtype=torch.float64)
    sums.add({"a": torch.empty(0)}, num_pairs=0)
    assert sums.means(lambda vector: vector + other, torch.device("cpu")) == {"a": 10.0}
