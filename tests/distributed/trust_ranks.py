"""Plants payloads in DeepSpeed's checkpoints and resumes from them; for test_trust.py.

torchrun --nproc-per-node 2 trust_ranks.py FOLDER WAY...

A way is the name of a DeepSpeed configuration. Each rank writes FOLDER/found-RANK.json: for each
way and kind of file, the error of the resume or "".
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dpofast import DPOTrainer
from dpofast.cli.process_end import run_to_end
from dpofast.errors import CheckpointError
from tests.payloads import Honest, Payload, plant, rewrite_manifest
from tests.support import make_trainer

# All files of a kind are read, so that no rank waits for another one that was stopped.
KINDS = {
    "optimizer": "global_step1/*_optim_states.pt",
    "model": "global_step1/*_model_states.pt",
    "scheduler": "scheduler.pt",
    "random": "rng_state_*.pth",
}
UNREAD = ("pytorch_model.bin", "adapter_model.bin", "optimizer.pt", "rng_state.pth")


def trainer_of(way: str, folder: Path, **options: Any) -> DPOTrainer:
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # left by the previous trainer
    fixed = {
        "deepspeed": way,
        "max_steps": 2,
        "logging_strategy": "no",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
    }
    return make_trainer(folder, options={**fixed, **options})


def plant_all(checkpoint: Path, kind: str, item: Any) -> None:
    """Add an object to all files of a kind, or put it into new files that nothing should read."""
    if kind == "unread":
        for name in (*UNREAD, "training_args.bin"):
            torch.save({"planted": item}, checkpoint / name)
        return
    files = sorted(checkpoint.glob(KINDS[kind]))
    assert files, KINDS[kind]
    for file in files:
        plant(file, item)


def resume(way: str, folder: Path, whole: Path, kind: str, item: Any, **options: Any) -> str:
    """Resume from a copy of a checkpoint with an object in all files of a kind; the error."""
    checkpoint = folder / f"{kind}-{type(item).__name__}" / whole.name
    if dist.get_rank() == 0:
        shutil.copytree(whole, checkpoint)
        plant_all(checkpoint, kind, item)
        rewrite_manifest(checkpoint)
    dist.barrier()
    trainer = trainer_of(way, folder, **options)
    try:
        trainer.train(str(checkpoint))
    except CheckpointError as error:
        return str(error)
    assert trainer.state.global_step == 2
    return ""


def attack(way: str, root: Path) -> dict[str, str]:
    folder = root / way
    trainer_of(way, folder, save_strategy="steps", save_steps=1).train()
    whole = folder / "run" / "checkpoint-1"
    found = {}
    for kind in (*KINDS, "unread"):
        payload = Payload(root / f"{way}-{kind}")
        found[kind] = resume(way, folder, whole, kind, payload)
    trusted = resume(way, folder, whole, "optimizer", Honest(), trust_checkpoint=True)
    return {**found, "trusted": trusted}


def main(root: Path, *ways: str) -> int:
    found = {way: attack(way, root) for way in ways}
    (root / f"found-{dist.get_rank()}.json").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    run_to_end(lambda: main(Path(sys.argv[1]), *sys.argv[2:]))
