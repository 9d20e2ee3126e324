"""Runs the command line; one rank kills itself a while after it has met the others.

LAUNCHER dying_ranks.py RANK SECONDS FILE WORDS...

RANK writes to FILE for how many seconds it has lived. With a negative SECONDS it lives on.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

from dpofast.cli import main
from dpofast.cli.process_end import run_to_end


def live(seconds: float, file: Path) -> None:
    """Count from the moment at which the process group exists."""
    dist = None
    while dist is None or not dist.is_initialized():
        time.sleep(0.01)
        dist = getattr(sys.modules.get("torch"), "distributed", None)
        dist = dist if hasattr(dist, "is_initialized") else None
    began = time.monotonic()
    unfinished = file.with_suffix(".new")
    while seconds < 0 or time.monotonic() - began < seconds:
        unfinished.write_text(str(time.monotonic() - began))
        unfinished.replace(file)  # the process may end at any moment
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    victim, seconds, file, *words = sys.argv[1:]
    if os.environ["RANK"] == victim:
        threading.Thread(target=live, args=(float(seconds), Path(file)), daemon=True).start()
    run_to_end(lambda: main(words))
