"""Means of metrics over batches and ranks of different sizes."""

from __future__ import annotations

import json

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


def test_metrics_that_not_all_pairs_have_are_means_over_those_that_have_them():
    sums, cpu = MetricSums(), torch.device("cpu")
    one, none = torch.tensor(1.0), torch.tensor(0.0)
    other = MetricSums()
    other.add({"a": torch.tensor([1.0, 5.0])}, 2)
    other.add({"b": torch.tensor(5.0)}, 0, {"b": one})
    sums.add(other.totals, 2, other.counts)
    sums.add({"a": torch.tensor([3.0])}, 1)
    sums.add({"b": torch.tensor(0.0)}, 0, {"b": none})
    restored = MetricSums()
    restored.restore(sums.recorded())
    assert sums.means(lambda vector: vector, cpu) == {"a": 3.0, "b": 5.0}
    assert restored.means(lambda vector: vector + vector, cpu) == {"a": 3.0, "b": 5.0}
    sums.add({"a": torch.tensor([1.0])}, 1)
    sums.add({"b": torch.tensor(0.0)}, 0, {"b": none})
    assert sums.means(lambda vector: vector, cpu) == {"a": 1.0}, "no pair has b"


def test_sums_of_early_versions_have_no_counts():
    sums = MetricSums()
    sums.restore({"sums": {"a": 6.0}, "num_pairs": 3})
    assert sums.means(lambda vector: vector, torch.device("cpu")) == {"a": 2.0}


def test_a_metric_with_a_count_of_its_own_is_a_ratio_of_two_sums():
    sums = MetricSums()
    first = {"per_token": torch.tensor([1.0, 2.0]), "a": torch.tensor([1.0, 3.0])}
    sums.add(first, 2, {"per_token": torch.tensor([10, 20])})
    sums.add(
        {"per_token": torch.tensor(6.0), "a": torch.tensor(5.0)}, 1, {"per_token": torch.tensor(3)}
    )
    means = sums.means(lambda vector: vector, torch.device("cpu"))
    assert means == {"per_token": pytest.approx(9 / 33), "a": pytest.approx(3.0)}


def test_counts_of_other_ranks_count_and_a_count_of_zero_has_no_mean():
    sums = MetricSums()
    values = {name: torch.tensor(0.0) for name in ("a", "none", "tokens")}
    sums.add(values, 0, {"none": torch.tensor(0), "tokens": torch.tensor(0)})
    # a, none, tokens; the counts of none and tokens; pairs
    other = torch.tensor([8.0, 0.0, 6.0, 0.0, 12.0, 2.0], dtype=torch.float64)
    means = sums.means(lambda vector: vector + other, torch.device("cpu"))
    assert means == {"a": 4.0, "tokens": 0.5}


def test_recorded_sums_and_counts_go_on_bit_for_bit():
    def add(sums, value):
        sums.add({"kl": torch.tensor(value)}, 1, {"kl": torch.tensor(7)})

    straight, resumed = MetricSums(), MetricSums()
    add(straight, 0.1)
    resumed.restore(json.loads(json.dumps(straight.recorded())))
    for sums in (straight, resumed):
        add(sums, 0.2)
    got, expected = (s.means(lambda v: v, torch.device("cpu")) for s in (resumed, straight))
    assert got == expected
