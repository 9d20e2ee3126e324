"""`dpofast demo`."""

from __future__ import annotations

import argparse
from pathlib import Path


def demo(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Run the demo; it takes no overrides."""
    del overrides
    from dpofast.demo.run import run_demo

    run_demo(Path(parsed.output_dir), parsed.seed)
