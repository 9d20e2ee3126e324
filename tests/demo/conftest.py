"""Undoes what a command of the command line changes in the process."""

from __future__ import annotations

from tests.cli.conftest import restored_process

__all__ = ["restored_process"]
