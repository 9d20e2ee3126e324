"""`dpofast demo`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def demo(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Run the demo; it takes no overrides."""
    del overrides
    # Before torch is imported: OpenMP's threads spin while they wait, by default for so long that a
    # small model gets many times slower where other programs want the same cores.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from dpofast.demo.run import run_demo

    run_demo(Path(parsed.output_dir), parsed.seed)
