"""A process with a gloo group ends before Python shuts down; every other one ends as usual."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import atexit, sys
import torch.distributed as dist
from dpofast.cli.process_end import run_to_end

class TakenDown:
    def __del__(self):
        print("taken down")

def main():
    if {has_gloo}:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    atexit.register(print, "exit handlers ran")
    global kept
    kept = TakenDown()
    print("worked", end=" ")
    {last}

run_to_end(main)
"""


def run(has_gloo, last):
    program = PROGRAM.format(has_gloo=has_gloo, last=last)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


@pytest.mark.parametrize("code", [0, 2])
@pytest.mark.slow
def test_ranks_of_gloo_end_after_the_exit_handlers(code):
    done = run(True, f"return {code}")
    assert done.returncode == code, done.stderr
    assert done.stdout == "worked exit handlers ran\n"


def test_other_processes_are_taken_down():
    done = run(False, "return 2")
    assert done.returncode == 2, done.stderr
    assert done.stdout == "worked exit handlers ran\ntaken down\n"


def test_an_exception_is_reported_as_ever():
    done = run(True, "raise RuntimeError('no room')")
    assert done.returncode == 1
    assert "RuntimeError: no room" in done.stderr
    assert "exit handlers ran" in done.stdout
