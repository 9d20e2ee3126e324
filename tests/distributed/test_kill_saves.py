"""Two ranks that are killed while they save resume bit for bit, and what is torn has no name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("kill_saves.py")
WAYS = ("ddp", "zero2", "zero3")


def run(*words: str) -> dict:
    """What the script reports."""
    paths = [str(ROOT), str(ROOT / "kernels")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(SCRIPT), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    report: dict = json.loads(done.stdout.splitlines()[-1])
    print(words[1:], report)
    return report


def check_kills(folder: Path, way: str, kills: int, seed: int, *more: str) -> None:
    report = run(str(folder), way, str(kills), str(seed), *more)
    assert report["killed"] == kills
    assert (report["lost"], report["torn"], report["wrong"]) == (0, 0, 0)
    assert report["runs"] >= 1


@pytest.mark.distributed
@pytest.mark.parametrize(("way", "over"), [("ddp", []), ("zero2", ["over"]), ("zero3", [])])
def test_ranks_killed_in_the_save_resume_with_the_same_losses(tmp_path, way, over):
    check_kills(tmp_path, way, 7, 0, *over)


@pytest.mark.torture
@pytest.mark.parametrize("over", [[], ["over"]])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.timeout(3000)
def test_many_kills(tmp_path, way, over):
    """Six parts with 34 kills each, 204 in all; `--stepwise` goes on with the next part."""
    check_kills(tmp_path, way, 34, 1, *over)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("way", "patterns"),
    [
        ("ddp", ["rng_state_1.pth"]),
        ("zero2", ["*zero_pp_rank_1_*optim_states.pt", "rng_state_1.pth"]),
        ("zero3", ["*rank_1_*model_states.pt", "*rank_1_*optim_states.pt", "rng_state_1.pth"]),
    ],
)
def test_a_rank_that_dies_before_it_writes_its_file_leaves_no_checkpoint(tmp_path, way, patterns):
    report = run(str(tmp_path), way, *patterns)
    assert report == {"died": len(patterns), "steps": [[2]] * len(patterns), "wrong": 0}
