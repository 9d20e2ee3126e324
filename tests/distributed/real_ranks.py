"""Trains on real pairs in several ways, one after the other; the main rank writes its logs.

torchrun --nproc-per-node 2 real_ranks.py whole|resumed FOLDER WAY...

A way is "ddp" or the name of a DeepSpeed configuration. `resumed` continues from the checkpoints
that `whole` has left in the same folder.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from dpofast.cli.process_end import run_to_end
from tests.real_pairs import OPTIONS, checkpoint, race_model, real_pairs, real_tokenizer
from tests.support import history, make_trainer


def main(phase: str, folder: str, *ways: str) -> int:
    torch.set_num_threads(1)
    tokenizer = real_tokenizer()
    pairs = real_pairs(tokenizer)
    for way in ways:
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # left by the previous way
        options = {
            "output_dir": f"{folder}/{way}",
            "gradient_accumulation_steps": 1,  # two ranks of two pairs
            "deepspeed": None if way == "ddp" else way,
        }
        trainer = make_trainer(
            Path(folder),  # all ways read one reference store
            race_model(tokenizer),
            pairs,
            options=OPTIONS | options,
            processing_class=tokenizer,
        )
        run = Path(folder, way)
        trainer.train(resume_from_checkpoint=checkpoint(run) if phase == "resumed" else None)
        if trainer.is_world_process_zero():
            Path(folder, f"{phase}-{way}.json").write_text(json.dumps(history(trainer)))
    return 0


if __name__ == "__main__":
    run_to_end(lambda: main(*sys.argv[1:]))
