from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reference import kill_builds

ROOT = Path(__file__).parents[3]


def run(mode, folder, rounds, seed):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, kill_builds.__file__, mode, str(folder / mode), str(rounds), str(seed)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_nothing_lost(report):
    assert report["lost"] == report["wrong"] == report["bad_stores"] == 0
    assert report["acknowledged"] > 0


def check_kills(folder, rounds, seed, mode="kill"):
    report = run(mode, folder, rounds, seed)
    assert report["killed"] == rounds
    assert report["complete"]
    assert report["duplicates"] == 0
    assert_nothing_lost(report)
    # at most the rows that wait for a commit, and the call that was killed
    assert report["most_redone"] <= kill_builds.COMMIT_ROWS + kill_builds.BATCH
    assert report["most_redone"] > 0  # otherwise no kill came between two commits


def check_parallel(folder, rounds, seed):
    report = run("parallel", folder, rounds, seed)
    assert report["incomplete"] == report["duplicates"] == 0
    assert report["merged"] > 0  # otherwise no two builds scored the same row
    assert report["killed"] == rounds
    assert report["longest_wait"] <= 30.0
    assert_nothing_lost(report)


@pytest.mark.slow
def test_builds_killed_at_any_moment_lose_no_acknowledged_row(tmp_path):
    check_kills(tmp_path, rounds=20, seed=0)


@pytest.mark.slow
def test_four_processes_write_at_once_and_one_is_killed(tmp_path):
    check_parallel(tmp_path, rounds=4, seed=0)


@pytest.mark.torture
@pytest.mark.slow
def test_many_kills(tmp_path):
    check_kills(tmp_path, rounds=1000, seed=1)


@pytest.mark.torture
@pytest.mark.slow
def test_builds_with_a_model_killed_at_any_moment_lose_no_acknowledged_row(tmp_path):
    check_kills(tmp_path, rounds=50, seed=0, mode="real")


@pytest.mark.torture
@pytest.mark.slow
def test_many_rounds_of_four_processes(tmp_path):
    check_parallel(tmp_path, rounds=200, seed=1)
