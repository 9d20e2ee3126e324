"""Trains and evaluates KTO on any number of ranks.

torchrun --nproc-per-node 2 kto_ranks.py FOLDER ROWS_PER_DEVICE ACCUMULATION WAY...

The ways are ddp, zero2 and zero3. The last step of an epoch has one row, so one of two ranks has
none. The main rank writes its logs to FOLDER/WAY.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from dpofast.cli.process_end import run_to_end
from tests.answers import answer_rows, make_kto


def main(folder: str, rows_per_device: str, accumulation: str, *ways: str) -> int:
    for way in ways:
        train(Path(folder), int(rows_per_device), int(accumulation), way)
    return 0


def train(folder: Path, rows_per_device: int, accumulation: int, way: str) -> None:
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # left by the previous way
    options = {
        "per_device_train_batch_size": rows_per_device,
        "gradient_accumulation_steps": accumulation,
        "per_device_eval_batch_size": rows_per_device * accumulation,
        "max_tokens_per_microbatch": 30,
        "deepspeed": None if way == "ddp" else way,
    }
    rows = answer_rows(9)
    trainer = make_kto(folder / way, rows=rows, options=options, eval_dataset=rows)
    trainer.train()
    trainer.evaluate()
    if trainer.is_world_process_zero():
        text = json.dumps(trainer.state.log_history)
        (folder / f"{way}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run_to_end(lambda: main(*sys.argv[1:]))
