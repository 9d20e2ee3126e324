"""Trains and evaluates KTO on any number of ranks.

torchrun --nproc-per-node 2 kto_ranks.py FOLDER ROWS_PER_DEVICE ACCUMULATION

The last step of an epoch has one row, so one of two ranks has none. The main rank writes its logs
to FOLDER/kto.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from dpofast.cli.process_end import run_to_end
from tests.answers import answer_rows, make_kto


def main(folder: str, rows_per_device: str, accumulation: str) -> int:
    options = {
        "per_device_train_batch_size": int(rows_per_device),
        "gradient_accumulation_steps": int(accumulation),
        "per_device_eval_batch_size": int(rows_per_device) * int(accumulation),
        "max_tokens_per_microbatch": 30,
    }
    rows = answer_rows(9)
    trainer = make_kto(Path(folder) / "run", rows=rows, options=options, eval_dataset=rows)
    trainer.train()
    trainer.evaluate()
    if trainer.is_world_process_zero():
        text = json.dumps(trainer.state.log_history)
        (Path(folder) / "kto.json").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_to_end(lambda: main(*sys.argv[1:]))
