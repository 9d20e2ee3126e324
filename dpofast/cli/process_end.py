"""How a rank's process ends once its work is done."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from typing import NoReturn


def run_to_end(main: Callable[[], int]) -> NoReturn:
    """Run a program's `main` and end the process with the exit code that it returns.

    A thread of gloo may hold the last reference to a tensor. If it lets go of that while Python is
    being taken down, the process aborts, and a run that has succeeded counts as failed (PyTorch's
    pull request 179291 describes it). So a process with gloo's ranks ends after Python's own exit
    handlers, without the rest; every other process, and one whose `main` raises, ends as usual.
    """
    codes: list[int] = []

    def end() -> None:
        if codes and _has_gloo():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(codes[0])

    atexit.register(end)  # what is registered first runs last
    codes.append(main())
    sys.exit(codes[0])


def _has_gloo() -> bool:
    """Whether this process has gloo's threads; PyTorch isn't imported for the question."""
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return False
    return "gloo" in str(dist.get_backend())
