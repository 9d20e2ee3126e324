"""The command line: `dpofast train | eval | ref | inspect | demo`."""

from __future__ import annotations

from typing import NoReturn

from dpofast.cli.main import main
from dpofast.cli.process_end import run_to_end

__all__ = ["command", "main"]


def command() -> NoReturn:
    """The process of `dpofast ...`."""
    run_to_end(main)
