"""`dpofast demo`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def demo(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Run the demo. `overrides` is empty, because the parser reads all options of the demo."""
    del overrides
    # OpenMP reads this when torch is imported. By default its threads spin for so long while they
    # wait that a small model runs many times slower when other programs want the same cores.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from dpofast.demo.run import run_demo

    run_demo(Path(parsed.output_dir), parsed.seed)
