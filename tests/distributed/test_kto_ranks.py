"""Two ranks train KTO like one: z of a step is that of all ranks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.launch import launch

pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).with_name("kto_ranks.py")
NAMES = ("loss", "grad_norm", "kl", "rewards/chosen", "rewards/rejected", "rewards/margins")


WAYS = ["ddp", "zero2", "zero3"]


def logs_of(folder, ranks, rows_per_device, accumulation, ways):
    launch(SCRIPT, ranks, str(folder), str(rows_per_device), str(accumulation), *ways)
    return {way: json.loads((folder / f"{way}.json").read_text()) for way in ways}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return logs_of(tmp_path_factory.mktemp("one"), 1, 4, 1, ["ddp"])["ddp"]


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    return logs_of(tmp_path_factory.mktemp("two"), 2, 1, 2, WAYS)


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_train_and_evaluate_as_one(one, on_two, way):
    two = on_two[way]
    assert len(one) == len(two)
    steps = [(a, b) for a, b in zip(one, two, strict=True) if "grad_norm" in a]
    assert len(steps) == 6
    assert max(a["kl"] for a, _ in steps) > 1e-3
    for name in NAMES:
        both = [(a[name], b[name]) for a, b in steps if name in a]
        np.testing.assert_allclose(*zip(*both, strict=True), rtol=1e-4, atol=1e-6, err_msg=name)
    (evaluated,) = [(a, b) for a, b in zip(one, two, strict=True) if "eval_loss" in a]
    for name in NAMES:
        if name != "grad_norm":
            a, b = (each[f"eval_{name}"] for each in evaluated)
            assert b == pytest.approx(a, rel=1e-4, abs=1e-6), name
