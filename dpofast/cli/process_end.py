"""Ends the process of a command or a rank once its work is done."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from typing import NoReturn


def run_to_end(main: Callable[[], int]) -> NoReturn:
    """Run a program's `main`, and end the process with the exit code that it returns.

    A thread of gloo can hold the last reference to a tensor. If the thread drops it while Python is
    shutting down, the process aborts, and a run that has succeeded counts as failed (PyTorch's pull
    request 179291 describes this). A process with a gloo group therefore ends right after Python's
    exit handlers and skips the rest of the shutdown. Every other process ends as usual, and so does
    one whose `main` raises.
    """
    codes: list[int] = []

    def end() -> None:
        if codes and _has_gloo():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(codes[0])

    atexit.register(end)  # handlers run in reverse order, so this one is the last
    codes.append(main())
    sys.exit(codes[0])


def _has_gloo() -> bool:
    """Whether this process has a gloo group, and so gloo's threads."""
    # Importing torch only to ask would take seconds; without it there is no group.
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return False
    return "gloo" in str(dist.get_backend())
