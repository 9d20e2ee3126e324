"""One of two ranks is killed at 50 points of a run; the other ends within 30 seconds of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.inputs import write_inputs
from tests.distributed.launch import ROOT, free_port

pytestmark = [pytest.mark.distributed, pytest.mark.torture]

SCRIPT = Path(__file__).with_name("dying_ranks.py")
POINTS = 50
WAYS = ("ddp", "zero2", "zero3")


def start(folder, victim, seconds, way):
    """Both ranks, without a launcher, which would end the other one."""
    words = ["train", str(folder / "run.yaml")] + (["--deepspeed", way] if way != "ddp" else [])
    command = [sys.executable, str(SCRIPT), str(victim), str(seconds), str(folder / "lived")]
    shared = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    variables = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    return [subprocess.Popen([*command, *words], env=each, **pipes) for each in variables]


@pytest.fixture(scope="module")
def lifetime(tmp_path_factory):
    """How long a run takes from the meeting of its ranks to its end, by way."""
    found = {}

    def of(way):
        if way not in found:
            folder = write_inputs(tmp_path_factory.mktemp(way))
            runs = start(folder, 1, -1, way)
            outputs = [run.communicate(timeout=500)[0] for run in runs]
            assert [run.returncode for run in runs] == [0, 0], outputs
            found[way] = float((folder / "lived").read_text())
        return found[way]

    return of


@pytest.mark.parametrize("point", range(POINTS))
def test_the_other_rank_ends_within_30_seconds(tmp_path, lifetime, point):
    way, victim = WAYS[point % len(WAYS)], point // len(WAYS) % 2
    seconds = lifetime(way) * (point + 0.5) / POINTS
    runs = start(write_inputs(tmp_path), victim, seconds, way)
    dead, other = runs[victim], runs[1 - victim]
    dead.communicate(timeout=500)
    died = time.monotonic()
    try:
        output, _ = other.communicate(timeout=30)
    finally:
        other.kill()
    print(
        f"point {point}: {way}, rank {victim} died after {seconds:.1f} s; the other ended "
        f"{time.monotonic() - died:.1f} s later with code {other.returncode}"
    )
    if dead.returncode == 0:  # it was faster than the one that was measured
        assert other.returncode == 0
        return
    assert dead.returncode == -signal.SIGKILL
    if other.returncode != 0:  # a rank that is killed after its work is done harms nobody
        assert other.returncode == 4, output
        assert output.count("dpofast: error: ") == 1, output
        assert f"dpofast: error: rank {victim} on host {os.uname().nodename} was lost: " in output
    else:
        assert (tmp_path / "run" / "summary.json").exists()
