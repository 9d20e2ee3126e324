from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("two_ranks.py")


def run(
    folder: Path,
    ranks: int,
    pairs_per_device: int,
    accumulation: int,
    stage: str = "",
    model: str = "llama",
) -> dict:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    shape = [str(pairs_per_device), str(accumulation)]
    arguments = [str(SCRIPT), str(folder), *shape, stage, model]
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, *launcher, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return run(tmp_path_factory.mktemp("ranks") / "one", 1, pairs_per_device=4, accumulation=1)


@pytest.mark.parametrize("stage", ["", "2", "3"], ids=["ddp", "zero2", "zero3"])
def test_two_ranks_train_and_evaluate_as_one(tmp_path, one, stage):
    two = run(tmp_path / "two", 2, pairs_per_device=1, accumulation=2, stage=stage)
    assert_alike(two, one)


@pytest.fixture(scope="module")
def one_mixture(tmp_path_factory):
    return run(tmp_path_factory.mktemp("ranks") / "one", 1, 2, 2, model="mixtral")


@pytest.mark.slow  # three starts of PyTorch and DeepSpeed
@pytest.mark.parametrize("stage", ["", "3"], ids=["ddp", "zero3"])
def test_the_routers_auxiliary_loss_is_that_of_the_same_micro_batches(tmp_path, one_mixture, stage):
    two = run(tmp_path / "two", 2, 2, 1, stage=stage, model="mixtral")
    assert one_mixture["logs"][0]["aux_loss"] > 0.5
    assert one_mixture["logs"][0]["loss"] > 0.9  # ln 2 and half the auxiliary loss
    assert_alike(two, one_mixture)


def assert_alike(two: dict, one: dict) -> None:
    """The same logs and evaluation, but for rounding."""
    assert len(one["logs"]) == len(two["logs"]) == 6
    names = [
        name
        for name in one["logs"][0]
        if name in ("loss", "aux_loss", "grad_norm", "num_tokens") or "/" in name
    ]
    assert len(names) >= 10
    for name in names:
        expected = [log[name] for log in one["logs"]]
        got = [log[name] for log in two["logs"]]
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6, err_msg=name)
    for name, expected in one["evaluation"].items():
        if "runtime" not in name and "per_second" not in name:
            assert two["evaluation"][name] == pytest.approx(expected, rel=1e-4, abs=1e-6), name
