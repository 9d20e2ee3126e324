"""Trains and resumes on any number of ranks; for test_same_ranks.py and the matrix of save points.

torchrun --nproc-per-node 2 same_ranks.py FOLDER JOB...

A job is the name of a JSON file FOLDER/JOB.json with these keys: `mode` ("ddp" or the name of a
DeepSpeed configuration), `way` (one of WAYS), `options` of DPOConfig, and `resume` (a checkpoint;
null for none). Rank 0 writes what came out to FOLDER/JOB.found.json: the logs without speeds, the
learning rates, a digest of weights and optimizer states of each rank, or the error.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from dpofast import DPOTrainer
from dpofast.cli.process_end import run_to_end
from dpofast.errors import DPOFastError
from dpofast.train.exchange import exchange
from tests.grouped import grouped_pairs
from tests.support import make_trainer, tiny_llama, token_pairs

STEPS = 13
PAIRS_PER_STEP = 4
SPEEDS = ("_per_second", "runtime")
# 18 pairs make epochs of five steps, of which the last has two pairs. "grouped" has 28 pairs of ten
# prompts in five steps. An epoch edge is a save at
# the end of an epoch; steps 5 and 10 are such saves in all ways.
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"disable_dropout": False},
    "workers": {"dataloader_num_workers": 2},
    "adapter": {},
    "grouped": {"group_by_prompt": True},
    "epoch edge": {"num_train_epochs": 3, "max_steps": -1, "logging_steps": 4},
}


def trainer_of(folder: Path, mode: str, way: str, options: dict[str, Any]) -> DPOTrainer:
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # left by the previous job
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    dropout = {"attention_dropout": 0.1} if way == "dropout" else {}
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    return make_trainer(
        folder,
        tiny_llama(**dropout),
        grouped_pairs() if way == "grouped" else token_pairs(18),
        options={
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": PAIRS_PER_STEP // ranks,
            "max_tokens_per_microbatch": 30,
            "save_strategy": "steps",
            "save_steps": 1,
            "max_steps": STEPS,
            "logging_steps": 3,
            "lr_scheduler_type": "linear",
            "weight_decay": 0.1,
            "deepspeed": None if mode == "ddp" else mode,
            **WAYS[way],
            **options,
        },
        peft_config=lora if way == "adapter" else None,
    )


def digest_of(trainer: DPOTrainer) -> list[str]:
    """A digest of the weights and the optimizer's states on each rank."""
    digest = hashlib.sha256()

    def add(name: str, value: Any) -> None:
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            digest.update(value.detach().float().numpy().tobytes())
        else:
            digest.update(repr(value).encode())

    for name, parameter in trainer.model.named_parameters():
        add(name, getattr(parameter, "ds_tensor", parameter))
    optimizer: Any = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    for group in optimizer.param_groups:
        for key, value in sorted(group.items()):
            if key != "params":
                add(key, value)
        for parameter in group["params"]:
            add("fp32", parameter)
            for key, value in sorted(optimizer.state[parameter].items()):
                add(key, value)
    return exchange(digest.hexdigest())


def run(root: Path, job: str) -> None:
    given = json.loads((root / f"{job}.json").read_text())
    trainer = trainer_of(root / given["folder"], given["mode"], given["way"], given["options"])
    try:
        output = trainer.train(resume_from_checkpoint=given.get("resume"))
    except DPOFastError as error:
        found: dict[str, Any] = {"error": f"{type(error).__name__}: {error}"}
    else:
        logs = [
            {key: value for key, value in log.items() if not key.endswith(SPEEDS)}
            for log in trainer.state.log_history
        ]
        groups = trainer.optimizer.param_groups
        found = {
            "logs": logs,
            "train_loss": output.training_loss,
            "digest": digest_of(trainer),
            "weight_decay": [group["weight_decay"] for group in groups],
            "clip": getattr(getattr(trainer.model_wrapped, "optimizer", None), "clip_grad", None),
        }
    if trainer.is_world_process_zero():
        (root / f"{job}.found.json").write_text(json.dumps(found))
    trainer.accelerator.wait_for_everyone()


def main(folder: str, *jobs: str) -> int:
    torch.set_num_threads(1)
    for job in jobs:
        run(Path(folder), job)
    return 0


if __name__ == "__main__":
    run_to_end(lambda: main(*sys.argv[1:]))
