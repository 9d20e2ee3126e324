"""A rank that fails or is lost ends all others; one that is only slow doesn't."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.launch import ROOT, free_port
from tests.distributed.nodes import cut_cable, environment, kill_all, two_nodes

pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).with_name("watched_ranks.py")
STARTED_WITHIN = 120.0
TIMEOUT = 4.0


def start(words, node=None, **variables):
    """A rank, without a launcher, which would end the others by itself."""
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    command = command if node is None else node.enter(command)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    base = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env={**base, **variables}, **pipes)


def start_here(ranks, way, victim, folder, timeout=TIMEOUT):
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(ranks)}
    words = (timeout, victim, way, folder)
    return [start(words, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(ranks)]


def ends(runs, within):
    """(exit code, stdout and stderr) of each process; all must end in so many seconds."""
    end = time.monotonic() + within
    try:
        outputs = [run.communicate(timeout=max(0.1, end - time.monotonic())) for run in runs]
    finally:
        for run in runs:
            run.kill()
    return [(run.returncode, "".join(output)) for run, output in zip(runs, outputs, strict=True)]


def wait_for(paths):
    end = time.monotonic() + STARTED_WITHIN
    while not all(path.exists() for path in paths):
        assert time.monotonic() < end, paths
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("way", "victim", "code", "line"),
    [
        ("error", 1, 1, "dpofast: error: rank 1 on host {host}: pairs.json, row 7: no."),
        ("bug", 0, 1, "dpofast: error: rank 0 on host {host}: KeyError: 'x'"),
        ("interrupted", 1, -2, "dpofast: error: rank 1 on host {host}: interrupted\n"),
        ("signalled", 1, 143, "dpofast: error: rank 1 on host {host}: ended by SIGTERM\n"),
        ("killed", 1, -9, "dpofast: error: rank 1 on host {host} was lost: its process has ended."),
        ("killed", 0, -9, "dpofast: error: rank 0 on host {host} was lost: its process has ended."),
    ],
)
def test_a_rank_that_fails_ends_the_others(tmp_path, way, victim, code, line):
    ranks = 3 if (way, victim) == ("killed", 0) else 2
    runs = start_here(ranks, way, victim, tmp_path)
    wait_for([tmp_path / f"{rank}.started" for rank in range(ranks)])
    found = ends(runs, within=30.0)
    assert [code for code, _ in found] == [code if rank == victim else 4 for rank in range(ranks)]
    output = "".join(text for _, text in found)
    assert output.count("dpofast: error: ") == 1
    assert line.format(host=os.uname().nodename) in output


@pytest.mark.parametrize(("way", "victim"), [("stopped", 0), ("stopped", 1), ("early", 1)])
def test_a_rank_that_is_slow_or_ends_early_ends_nobody(tmp_path, way, victim):
    found = ends(start_here(2, way, victim, tmp_path, timeout=2.0), within=STARTED_WITHIN)
    assert [code for code, _ in found] == [0, 0], found
    assert not any("dpofast: " in text for _, text in found), found
    assert all((tmp_path / f"{rank}.done").exists() for rank in range(2))


@pytest.mark.parametrize("harm", ["cut", "power"])
def test_a_node_that_is_lost_ends_the_other(tmp_path, harm):
    """Two ranks on each of two nodes."""
    with two_nodes() as nodes:
        shared = {"MASTER_ADDR": nodes[0].address, "MASTER_PORT": "29517", "WORLD_SIZE": "4"}
        runs = [
            start(
                (TIMEOUT, 0, "none", tmp_path),
                nodes[rank // 2],
                RANK=str(rank),
                LOCAL_RANK=str(rank % 2),
                GROUP_RANK=str(rank // 2),
                **{**environment(), **shared},
            )
            for rank in range(4)
        ]
        wait_for([tmp_path / f"{rank}.started" for rank in range(4)])
        cut_cable(nodes) if harm == "cut" else kill_all(nodes[1])
        found = ends(runs, within=30.0)
    dead = [-signal.SIGKILL] * 2 if harm == "power" else [4, 4]
    assert [code for code, _ in found] == [4, 4, *dead]
    texts = ["".join(text for _, text in found[:2]), "".join(text for _, text in found[2:])]
    assert [text.count("dpofast: error: ") for text in texts] == [1, int(harm == "cut")], texts
    assert "on host node-b w" in texts[0]
    if harm == "cut":
        assert f"no answer for {TIMEOUT:g} s" in texts[0]
        assert f"rank 0 on host node-a was lost: no answer for {TIMEOUT:g} s" in texts[1]
