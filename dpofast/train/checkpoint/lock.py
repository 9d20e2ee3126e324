"""Keeps a second run out of an output folder while a first one writes to it."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dpofast.errors import CheckpointError

# transformers uploads no file whose name begins with "_" to the hub.
LOCK_FILE = "_dpofast_lock"
HOLDER_FILE = "_dpofast_lock.json"  # a lock's own file may be emptied by whoever tries the lock
# Worker processes of a killed run hold its lock until they notice, which takes PyTorch's 5 seconds.
SECONDS_AFTER_A_KILL = 30.0

logger = logging.getLogger(__name__)


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold the lock of an output folder inside the `with` block.

    The lock is the operating system's, which releases it when the process ends in any way.

    Args:
        folder: output folder; it exists.

    Raises:
        CheckpointError: another process holds it; names the process.
    """
    lock = FileLock(Path(folder) / LOCK_FILE)
    if not _acquire(lock, Path(folder)):
        yield
        return
    try:
        with suppress(OSError):  # a full disk; the lock holds all the same
            _holder_path(folder).write_text(json.dumps(_this_process()), encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            _holder_path(folder).unlink(missing_ok=True)
        lock.release()


def _acquire(lock: Any, folder: Path) -> bool:
    """Take a lock; False if the file system has no locks."""
    deadline = time.monotonic() + SECONDS_AFTER_A_KILL
    has_said = False
    while True:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            holder = _read_holder(folder)
            if not _was_killed(holder) or time.monotonic() > deadline:
                raise CheckpointError(_refusal(folder, holder)) from None
            if not has_said:
                logger.warning("output_dir: waiting for the processes of a killed run to end.")
            has_said = True
            time.sleep(0.2)
        except (OSError, NotImplementedError) as error:
            logger.warning(
                "output_dir: %s can't be locked (%s), so nothing keeps a second run out of it.",
                *(folder, error),
            )
            return False
        else:
            return True


def _this_process() -> dict[str, Any]:
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": since}


def _holder_path(folder: str | Path) -> Path:
    return Path(folder) / HOLDER_FILE


def _read_holder(folder: Path) -> dict[str, Any]:
    try:
        holder = json.loads(_holder_path(folder).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _was_killed(holder: dict[str, Any]) -> bool:
    """Whether the process that took the lock was one of this host, and is there no more."""
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # a process of another user
        return False
    return False


def _refusal(folder: Path, holder: dict[str, Any]) -> str:
    who = "another process"
    if {"host", "pid", "since"} <= holder.keys():
        who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    return (
        f"output_dir: {str(folder)!r} is in use by another run ({who}): wait for it to end, or "
        "give this run an output_dir of its own."
    )
