"""Starts commands on several ranks, all on this machine's CPU."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def torchrun(ranks: int) -> list[str]:
    """The start of a command that runs a script, or `-m` and a module, on this many ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, *launcher]


def free_port() -> str:
    """A free port, for launchers whose default port can be in use."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run_ranks(command: list[str], timeout: float = 300.0) -> None:
    """Run a launcher's command, one thread a rank, and wait for all of its processes.

    Raises:
        AssertionError: a rank failed; the message is the end of what was printed.
        subprocess.TimeoutExpired: the command didn't end in time.
    """
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)  # the launcher ends its ranks
            raise
    assert process.returncode == 0, output[-6000:]


def launch(script: Path, ranks: int, *arguments: str, timeout: float = 300.0) -> None:
    """Run `script` under torchrun; raises what `run_ranks` raises."""
    run_ranks([*torchrun(ranks), str(script), *arguments], timeout)
