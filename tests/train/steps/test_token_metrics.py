"""Numerators and denominators of metrics over tokens."""

from __future__ import annotations

import torch

from dpofast.train.steps.token_metrics import statistics_of, token_metric_sums

NAMES = ("logits/rejected", "entropy", "logits/chosen", "mean_token_accuracy")


def test_each_statistic_is_asked_for_once() -> None:
    assert statistics_of(NAMES) == ("mean_logit", "entropy", "is_top")
    assert statistics_of(()) == ()


def test_sums_and_counts() -> None:
    statistics = torch.tensor(
        [[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0], [1.0, 5.0, 2.0, 6.0]]
    )
    sums, counts = token_metric_sums(NAMES, statistics, torch.tensor([[2, 3], [5, 7]]))
    assert {name: (sums[name].item(), counts[name].item()) for name in NAMES} == {
        "logits/rejected": (6.0, 10),
        "entropy": (100.0, 17),
        "logits/chosen": (4.0, 7),
        "mean_token_accuracy": (3.0, 7),
    }


def test_a_rank_without_pairs_has_the_same_names() -> None:
    nothing = torch.zeros(3, 0), torch.zeros(0, 2, dtype=torch.int64)
    sums, counts = token_metric_sums(NAMES, *nothing)
    assert set(sums) == set(counts) == set(NAMES)
    assert token_metric_sums((), None, nothing[1]) == ({}, {})
