"""The command line: `dpofast train | eval | ref | inspect | demo`."""

from __future__ import annotations

from typing import NoReturn

from dpofast.cli.main import main
from dpofast.cli.process_end import run_to_end

__all__ = ["command", "main"]


def command() -> NoReturn:
    """Run the command `dpofast` and end the process with its exit code."""
    run_to_end(main)
