"""Prints rich text, and lets errors of the terminal reach the caller."""

from __future__ import annotations

import sys
from typing import Any


def print_rich(renderable: Any) -> None:
    """Print a rich renderable to sys.stdout.

    Rich's own print would end the process with exit code 1 if the reader closes the pipe. Here the
    BrokenPipeError reaches `main`, which has an exit code for it. Characters that the terminal's
    encoding doesn't have become question marks.
    """
    from rich.console import Console

    console = Console(highlight=False)
    with console.capture() as captured:
        console.print(renderable)
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(captured.get().encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()
