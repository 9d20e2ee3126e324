"""The command line: `dpofast train | eval | ref | inspect | demo`."""

from __future__ import annotations

from dpofast.cli.main import main

__all__ = ["main"]
