"""`python -m dpofast` is the command `dpofast`."""

from __future__ import annotations

from dpofast.cli import command

command()
