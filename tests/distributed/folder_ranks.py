"""Exports finished runs, and meets a folder in use and a full disk; for test_output_folder.py.

torchrun --nproc-per-node 2 folder_ranks.py FOLDER WAY...

A way is "ddp" or the name of a DeepSpeed configuration; "locked" and "full" are runs under DDP. The
disk of "full" is mounted at FOLDER/full/run. Each rank writes FOLDER/WAY.RANK.json.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from dpofast import DPOTrainer
from dpofast.cli.process_end import run_to_end
from dpofast.errors import DPOFastError
from dpofast.train.checkpoint.lock import locked
from tests.support import make_trainer

# An epoch has three steps, so the run ends within one.
SAVING = {
    "max_steps": 5,
    "save_strategy": "steps",
    "save_steps": 2,
    "per_device_train_batch_size": 1,
    "overwrite_output_dir": False,
}


class FillsDisk(TrainerCallback):
    """Takes all room but three pages on a disk before the save of step 4, on rank 0."""

    def __init__(self, disk: Path) -> None:
        self.disk = disk

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4 and state.is_world_process_zero:
            free = os.statvfs(self.disk)
            (self.disk / "filler").write_bytes(bytes((free.f_bavail - 3) * free.f_bsize))


def finished(folder: Path, way: str) -> dict[str, Any]:
    """Train, and resume at the end; the trainer of the second call has trained nothing."""
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # left by the previous way
    options = {**SAVING, "deepspeed": None if way == "ddp" else way}

    def trained() -> DPOTrainer:
        trainer = make_trainer(folder / way, options=options)
        trainer.train(resume_from_checkpoint="auto")
        return trainer

    first, second = trained(), trained()
    second.save_model()
    return {
        "pairs": [first.pairs_trained, second.pairs_trained],
        "steps": second.state.global_step,
        "same run": first.run_id == second.run_id,
    }


def error_of(trainer: DPOTrainer) -> dict[str, Any]:
    try:
        trainer.train()
    except DPOFastError as error:
        return {"kind": type(error).__name__, "error": str(error)}
    return {}


def in_use(folder: Path) -> dict[str, Any]:
    """Rank 0 meets the lock of a run of its own process, and both ranks hear of it."""
    trainer = make_trainer(folder / "locked", options=SAVING)
    with ExitStack() as stack:
        if trainer.is_world_process_zero():
            stack.enter_context(locked(trainer.args.output_dir))
        return error_of(trainer)


def main(root: str, *ways: str) -> int:
    torch.set_num_threads(1)
    folder = Path(root)
    for way in ways:
        if way == "locked":
            report = in_use(folder)
        elif way == "full":
            disk = folder / "full" / "run"
            fills = [FillsDisk(disk)]
            report = error_of(make_trainer(folder / "full", options=SAVING, callbacks=fills))
        else:
            report = finished(folder, way)
        (folder / f"{way}.{os.environ['RANK']}.json").write_text(json.dumps(report))
    return 0


if __name__ == "__main__":
    run_to_end(lambda: main(*sys.argv[1:]))
