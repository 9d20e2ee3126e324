"""One run at a time writes to an output folder."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import filelock
import pytest

from dpofast.errors import CheckpointError
from dpofast.train.checkpoint.lock import HOLDER_FILE, locked

ROOT = Path(__file__).parents[3]
HOLDER = """
import os, sys, time
from dpofast.train.checkpoint.lock import locked
with locked(sys.argv[1]):
    if "fork" in sys.argv:
        if not os.fork():  # a worker, which outlives its killed parent by a moment
            time.sleep(1.5)
            os._exit(0)
    print("locked", flush=True)
    time.sleep(60)
"""


def start_holder(folder: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-c", HOLDER, str(folder), *more]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


def test_the_lock_is_free_after_each_use_also_after_an_error(tmp_path):
    for _ in range(2):
        with locked(tmp_path):
            pass
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    with locked(tmp_path):
        holder = json.loads((tmp_path / HOLDER_FILE).read_text())
        assert (holder["host"], holder["pid"]) == (socket.gethostname(), os.getpid())
        with pytest.raises(CheckpointError, match=rf"in use by .*process {os.getpid()} on"):
            locked(tmp_path).__enter__()
    assert not (tmp_path / HOLDER_FILE).exists()


@pytest.mark.slow  # starts two processes
@pytest.mark.parametrize("more", [[], ["fork"]])
def test_another_process_is_named_and_its_kill_frees_the_folder(tmp_path, more):
    process = start_holder(tmp_path, *more)
    with pytest.raises(CheckpointError) as error, locked(tmp_path):
        pass
    message = str(error.value)
    assert message.startswith(f"output_dir: {str(tmp_path)!r} is in use by another run (process ")
    assert f"{process.pid} on {socket.gethostname()}, since 20" in message
    assert message.endswith("or give this run an output_dir of its own.")
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    with locked(tmp_path):
        assert json.loads((tmp_path / HOLDER_FILE).read_text())["pid"] == os.getpid()


def test_a_disk_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", fail)
    with locked(tmp_path):
        pass
    assert "can't be locked ([Errno 37] No locks available)" in caplog.text
