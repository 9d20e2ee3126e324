"""Trains a hybrid on real pairs on any number of ranks, which write what they have run.

torchrun --nproc-per-node 2 hybrid_ranks.py FOLDER DEEPSPEED

The pairs are in FOLDER/pairs. Rank R writes the tokens of its rows, as counted and as planned, to
FOLDER/rank-R.json; the main rank writes the losses and norms to FOLDER/history.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from datasets import load_from_disk

from dpofast.cli.process_end import run_to_end
from tests.hybrid_steps import PAIRS_PER_STEP, hybrid_trainer, planned_rows, watch_body
from tests.support import train


def main(folder: Path, deepspeed: str) -> int:
    torch.set_num_threads(1)
    ranks = int(os.environ["WORLD_SIZE"])
    options = {
        "deepspeed": deepspeed,
        "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": PAIRS_PER_STEP // ranks,
    }
    trainer = hybrid_trainer(folder, load_from_disk(str(folder / "pairs")), **options)
    body_tokens = watch_body(trainer)
    found = train(trainer)
    assert "ACCELERATE_USE_DEEPSPEED" in os.environ
    counts = {"counted": body_tokens, "planned": planned_rows(trainer)}
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(counts))
    if trainer.is_world_process_zero():
        (folder / "history.json").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    run_to_end(lambda: main(Path(sys.argv[1]), sys.argv[2]))
