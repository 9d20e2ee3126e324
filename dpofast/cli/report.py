"""Prints the error that ends a command; on several ranks, once for all of them."""

from __future__ import annotations

import os
import sys
import time

from dpofast.errors import (
    ConfigError,
    DataError,
    DifferentRunError,
    DPOFastError,
    SeveralOptionsError,
    StoppedBySignal,
    one_line,
)
from dpofast.ranks.member import num_ranks
from dpofast.ranks.watch import INTERRUPTED, end_watch, report_failure, stop_text

EXIT_INTERRUPTED = 130  # the code that shells report for Ctrl-C
# In this time, launchers end the other ranks of a machine when one has ended with an error.
LAUNCHER_SECONDS = 3.0


def report(error: DPOFastError) -> int:
    """Print an error on stderr: as one line, or with a line for each of several rows or options.

    Returns:
        The exit code.
    """
    has_lines = isinstance(error, DataError | DifferentRunError | SeveralOptionsError)
    lines = str(error).splitlines() if has_lines else [str(error)]
    sentence = "\n  ".join(" ".join(line.split()) for line in lines)
    code = report_failure(sentence, error, error.exit_code)
    if code is None:
        if isinstance(error, ConfigError):
            _let_first_rank_speak()
        print(f"dpofast: error: {_own_rank()}{sentence}", file=sys.stderr)
    return error.exit_code if code is None else code


def report_bug(error: Exception) -> int:
    """Print the traceback of an unexpected exception, with the rank where it came from.

    Raises:
        Exception: the error itself, if there are no other ranks; Python prints it.
    """
    code = report_failure(f"{type(error).__name__}: {one_line(error)}", error, 1)
    if code is None:
        raise error
    return code


def report_interrupt(error: KeyboardInterrupt) -> int:
    """Print that Ctrl-C has ended the command."""
    if report_failure(INTERRUPTED, error, EXIT_INTERRUPTED) is None:
        print(f"dpofast: {INTERRUPTED}", file=sys.stderr)
    return EXIT_INTERRUPTED


def report_stop(stopped: StoppedBySignal) -> int:
    """Tell the other ranks that a signal has ended this one; the trainer has told the user.

    Returns:
        The exit code.
    """
    code = 128 + stopped.signum
    if stopped.checkpoint is not None:  # all ranks end together
        end_watch()
    else:
        report_failure(stop_text(stopped), stopped, code)
    return code


def _own_rank() -> str:
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"rank {rank}: "


def _let_first_rank_speak() -> None:
    """Give the first rank of this machine the time to print an error that all ranks have."""
    if num_ranks() > 1 and os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(LAUNCHER_SECONDS)
