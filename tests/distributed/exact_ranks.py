"""Runs a step of each kind of loss in fp64 on any number of ranks; the main rank saves it.

torchrun --nproc-per-node 2 exact_ranks.py FOLDER WAY...

The ways are ddp and names of DeepSpeed configurations. The loss and the gradients of a kind are in
FOLDER/WAY.KIND.pt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from dpofast.cli.process_end import run_to_end
from tests.exact_steps import KINDS, ROWS, trained_step


def main(folder: str, *ways: str) -> int:
    torch.set_num_threads(1)
    for way in ways:
        for name, kind in KINDS.items():
            os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # left by the previous step
            step = trained_step(
                Path(folder) / way / name,
                kind,
                per_device_train_batch_size=ROWS // int(os.environ["WORLD_SIZE"]),
                deepspeed=None if way == "ddp" else way,
            )
            assert ("ACCELERATE_USE_DEEPSPEED" in os.environ) is (way != "ddp")
            if os.environ["RANK"] == "0":
                torch.save(step, Path(folder) / f"{way}.{name}.pt")
    return 0


if __name__ == "__main__":
    run_to_end(lambda: main(*sys.argv[1:]))
