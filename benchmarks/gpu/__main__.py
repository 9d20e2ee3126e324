"""Runs what matters most on a GPU; every stage leaves its JSON even if another one fails.

python -m benchmarks.gpu --quick                # both parts: make gpu-quick
python -m benchmarks.gpu --quick --part head    # under 6 minutes
python -m benchmarks.gpu --quick --part step    # under 4 minutes
python -m benchmarks.gpu --full                 # hours: all tests, sizes and peers
python -m benchmarks.gpu --quick --dry-run      # toy sizes on a CPU, to see that everything runs
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from benchmarks import REPOSITORY
from benchmarks.gpu.runner import run_stages
from benchmarks.gpu.stages import PARTS, SHAPES, stages_of
from benchmarks.stamps import stamps

NOTES = (
    "The device sleeps for a millisecond before each timed call, so that no contender's time "
    "includes the host's Python before its first kernel.",
    "cuDNN's attention is switched off for TRL and plain PyTorch where its gradients are NaN "
    "(pytorch#196678); `attention` of a contender says so.",
)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, _exit)  # ends the running stage, too
    options.out.mkdir(parents=True, exist_ok=True)
    is_good = True
    for part in options.parts:
        summary: dict[str, Any] = {
            "benchmark": "gpu",
            "part": part,
            "is_quick": options.quick,
            "dry_run": options.dry_run,
            "notes": NOTES,
            "stages": {},
            "stamps": stamps("benchmarks.gpu"),
        }
        stages = stages_of(part, options.shape, is_quick=options.quick, dry_run=options.dry_run)
        if options.stages:
            stages = [stage for stage in stages if stage.name in options.stages]
        is_good &= run_stages(stages, options.out, environment(options.dry_run), summary)
    print(f"Results are in {options.out}.")
    return 0 if is_good else 1


def environment(dry_run: bool) -> dict[str, str]:
    """What the stages' processes need in their environment."""
    paths = [str(REPOSITORY), str(REPOSITORY / "kernels"), os.environ.get("PYTHONPATH", "")]
    found = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if dry_run:
        found |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "DS_ACCELERATOR": "cpu"}
    else:
        # Rows of ever new lengths leave gaps in memory otherwise.
        found["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--quick", action="store_true", help="ten minutes")
    size.add_argument("--full", action="store_true", help="hours")
    add("--part", dest="parts", choices=PARTS, nargs="+", default=list(PARTS), help="default: both")
    add("--stages", nargs="+", metavar="NAME", default=[], help="only these")
    add("--shape", choices=SHAPES, default="0.5b", help="of the step; default: %(default)s")
    add("--out", type=Path, default=Path("runs/bench/gpu"), help="folder; default: %(default)s")
    add("--dry-run", action="store_true", help="toy sizes on a CPU")
    options = parser.parse_args(arguments)
    options.out = options.out.resolve()
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA or ROCm device; try --dry-run")
    given = [
        stage.name
        for part in options.parts
        for stage in stages_of(part, options.shape, is_quick=options.quick, dry_run=True)
    ]
    for name in options.stages:
        if name not in given:
            parser.error(f"there is no stage {name}, expected one of {', '.join(given)}")
    return options


def _exit(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
