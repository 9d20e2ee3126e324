"""Signals end runs on several ranks, which other runs resume; for test_signals.py.

torchrun --nproc-per-node 2 signal_ranks.py FOLDER WAY...

A way is "ddp" or the name of a DeepSpeed configuration. Each rank checks everything by itself.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from dpofast import DPOTrainer
from dpofast.cli.process_end import run_to_end
from dpofast.errors import StoppedBySignal
from tests.support import history, make_trainer, tiny_llama, token_pairs

STEPS = 4
# (step in which the signal comes, ranks that get it, signal)
CASES = [
    (2, [1], signal.SIGUSR1),
    (3, [0], signal.SIGINT),  # an epoch ends with this step
    (STEPS, [0, 1], signal.SIGTERM),
]


class Signals(TrainerCallback):
    """Sends this rank a signal in a step."""

    def __init__(self, step: int, sent: signal.Signals) -> None:
        self.step, self.sent = step, sent

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), self.sent)


def trainer_of(folder: Path, way: str, *callbacks: Any) -> DPOTrainer:
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # left by the previous way
    options = {
        "deepspeed": None if way == "ddp" else way,
        "per_device_train_batch_size": 1,
        "max_steps": STEPS,
        "disable_dropout": False,
        "dataloader_num_workers": 1 if way == "ddp" else 0,
    }
    model = tiny_llama(attention_dropout=0.1)
    return make_trainer(folder, model, token_pairs(12), options=options, callbacks=callbacks)


def weights(trainer: DPOTrainer) -> list[torch.Tensor]:
    import deepspeed

    found = []
    for parameter in trainer.model.parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found.append(parameter.detach().clone())
    return found


def stop(folder: Path, way: str, step: int, ranks: list[int], sent: signal.Signals) -> None:
    rank = int(os.environ["RANK"])
    callbacks = [Signals(step, sent)] if rank in ranks else []
    expected = KeyboardInterrupt if sent is signal.SIGINT else StoppedBySignal
    try:
        trainer_of(folder, way, *callbacks).train()
    except expected as stopped:
        code = getattr(stopped, "code", None)
        assert code == (None if sent is signal.SIGINT else 128 + sent), code
    else:
        raise AssertionError(f"{way}: {sent.name} in step {step} has not ended the run")
    run = folder / "run"
    assert [path.name for path in run.glob("checkpoint-*")] == [f"checkpoint-{step}"]
    assert not {"summary.json", "model.safetensors"} & {path.name for path in run.iterdir()}
    assert signal.getsignal(sent) in (signal.SIG_DFL, signal.default_int_handler)


def check(folder: Path, way: str) -> None:
    unbroken = trainer_of(folder / "unbroken", way)
    unbroken.train()
    for step, ranks, sent in CASES:
        here = folder / f"{sent.name}-{step}"
        stop(here, way, step, ranks, sent)
        if step == STEPS:
            continue  # nothing is left to train
        resumed = trainer_of(here, way)
        resumed.train(resume_from_checkpoint=True)
        assert history(resumed) == history(unbroken), (way, step)
        pairs = zip(weights(resumed), weights(unbroken), strict=True)
        assert all(torch.equal(own, other) for own, other in pairs), (way, step)
        if resumed.is_world_process_zero():
            assert (here / "run" / "summary.json").is_file()


def main() -> int:
    torch.set_num_threads(1)
    for way in sys.argv[2:]:
        check(Path(sys.argv[1]) / way, way)
    return 0


if __name__ == "__main__":
    run_to_end(main)
