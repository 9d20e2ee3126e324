"""Ranks that watch each other and do nothing but wait for each other in a collective.

LAUNCHER watched_ranks.py TIMEOUT RANK WAY FOLDER

RANK comes to harm after a while, in one way: "error" and "bug" raise; "interrupted" and "signalled"
raise what a signal before the first step does; "killed" is what the system
does when memory runs out; "stopped" is stopped for longer than TIMEOUT and continued; "early" ends
in peace while the others go on; "none" leaves it to others. Each rank writes FOLDER/N.started when
it has met the others, and FOLDER/N.done when it has done all.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from dpofast.cli.process_end import run_to_end
from dpofast.errors import DataError, StoppedBySignal
from dpofast.ranks.watch import note_stop, watch_ranks

ROUNDS, HARM = 60, 10


def main(timeout: float, victim: int, way: str, folder: Path) -> int:
    watch_ranks(timeout)
    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    rank = dist.get_rank()
    dist.barrier()
    time.sleep(1.0)  # the watchers have met by now
    (folder / f"{rank}.started").touch()
    rounds = ROUNDS if way in ("stopped", "early") else 10**6
    for step in range(HARM if way == "early" else rounds):
        if step == HARM and rank == victim:
            harm(way, timeout)
        dist.all_reduce(torch.ones(1))
        time.sleep(0.02)
    if way == "early" and rank != victim:
        time.sleep(3.0)  # as rank 0 does, which writes a model while the others have ended
    (folder / f"{rank}.done").touch()
    return 0


def harm(way: str, timeout: float) -> None:
    match way:
        case "error":
            raise DataError("pairs.json, row 7: no.")
        case "bug":
            raise KeyError("x")
        case "interrupted":
            raise KeyboardInterrupt
        case "signalled":
            stopped = StoppedBySignal(signal.SIGTERM)
            note_stop(stopped)
            raise stopped
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stopped":
            again = f"sleep {timeout + 3}; kill -CONT {os.getpid()}"
            subprocess.Popen(["sh", "-c", again])
            os.kill(os.getpid(), signal.SIGSTOP)


if __name__ == "__main__":
    timeout, victim, way, folder = sys.argv[1:]
    run_to_end(lambda: main(float(timeout), int(victim), way, Path(folder)))
