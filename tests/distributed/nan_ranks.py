"""Runs every way of tests/nan_ways.py on several ranks; for test_nan.py.

torchrun --nproc-per-node 2 nan_ranks.py FOLDER [DEEPSPEED]

FOLDER has a folder `model`. Rank 0 writes FOLDER/found.json: what each way ended with, by rank.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from accelerate import PartialState

from dpofast.cli.process_end import run_to_end
from dpofast.train.exchange import exchange
from tests.nan_ways import WAYS, run_way


def main(root: Path, deepspeed: str | None = None) -> int:
    found = {}
    for number, way in enumerate(WAYS):
        error = run_way(root / f"way{number}", way, deepspeed=deepspeed)
        found[way] = exchange((type(error).__name__, getattr(error, "exit_code", None), str(error)))
    if PartialState().is_main_process:
        (root / "found.json").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    run_to_end(lambda: main(Path(sys.argv[1]), *sys.argv[2:]))
