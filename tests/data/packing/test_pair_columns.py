"""Weights, confidences and datasets of pairs reach the micro-batches in the pairs' order."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch

from dpofast.data.packing.collate import Layout
from dpofast.data.packing.pair_columns import PairColumns, set_names, short_names
from dpofast.data.packing.plan import PlannedStep
from dpofast.data.packing.step_dataset import StepDataset

ROWS = [
    {"prompt_ids": [5], "chosen_ids": [10 + n], "rejected_ids": [9], "row": n} for n in range(4)
]


def dataset(**columns):
    rows = [row | {c: values[n] for c, values in columns.items()} for n, row in enumerate(ROWS)]
    return datasets.Dataset.from_list(rows)


@pytest.mark.parametrize("layout", ["shared", "unshared", "padded"])
def test_a_micro_batch_has_those_of_its_pairs(layout):
    pairs = dataset(
        weight=[1.0, None, 0.0, 4.0],
        label_confidence=[None, 0.75, 0.5, 1.0],
        source=["x/a.jsonl", "x/a.jsonl", "b", "b"],
    )
    steps = StepDataset(pairs, np.zeros((4, 2)), Layout(layout), usual_confidence=0.9)
    step = steps.__getitems__(PlannedStep(([3, 0], [1, 2], []), 4))
    first, second, empty = step.micro_batches
    assert first.labels[0] == 13, "the order of the plan"
    assert first.weights.tolist() == [4.0, 1.0]
    assert first.label_confidence.tolist() == [1.0, 0.9]
    assert first.sets.tolist() == [1, 0]
    assert second.weights.tolist() == [1.0, 0.0]
    assert second.label_confidence.tolist() == [0.75, 0.5]
    assert second.sets.tolist() == [0, 1]
    for batch in (first, second, empty):
        assert batch.set_names == ("a", "b")
        assert batch.weights.dtype == batch.label_confidence.dtype == torch.float64
        assert batch.sets.dtype == torch.int64
    assert len(empty.weights) == len(empty.label_confidence) == len(empty.sets) == 0


@pytest.mark.parametrize("columns", [{}, {"weight": [None] * 4, "source": ["a"] * 4}])
def test_without_columns_there_is_nothing(columns):
    assert PairColumns.of(dataset(**columns)) == PairColumns()
    assert set_names(dataset(**columns)) == ()


def test_names_of_sets_are_short_where_that_tells_them_apart():
    assert short_names(["/x/a.jsonl", "org/b.v2", "c.json.gz"]) == ("a", "b.v2", "c")
    assert short_names(["x/a.jsonl", "y/a.parquet"]) == ("x/a.jsonl", "y/a.parquet")
