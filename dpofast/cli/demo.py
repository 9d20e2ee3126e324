"""`dpofast demo`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def demo(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Run the demo, or compare several losses and betas.

    `overrides` is empty, because the parser reads all options of the demo.
    """
    del overrides
    # OpenMP reads this when torch is imported. By default its threads spin for so long while they
    # wait that a small model runs many times slower when other programs want the same cores.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from dpofast.demo.compare import compare
    from dpofast.demo.run import run_demo
    from dpofast.demo.training import make_recipes

    recipes = make_recipes(parsed.loss_type, parsed.beta)
    folder = Path(parsed.output_dir)
    if len(recipes) == 1:
        run_demo(folder, parsed.seed, recipes[0])
    else:
        compare(folder, parsed.seed, recipes)
