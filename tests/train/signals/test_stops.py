"""A signal ends a run with a checkpoint from which another run goes on as if nothing had come."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import EarlyStoppingCallback

from dpofast import DPOTrainer
from dpofast.errors import StoppedBySignal
from tests.support import history, make_trainer, tiny_llama, token_pairs

STARTS = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}


class Signals(TrainerCallback):
    """Sends this process a signal at an event of the trainer.

    Args:
        at: name of the event.
        step: steps that are done then.
        sent: the signal.
        after: how often the event passes in that step before.
    """

    def __init__(
        self, at: str, step: int, sent: signal.Signals = signal.SIGTERM, after: int = 0
    ) -> None:
        self.step, self.sent, self.after = step, sent, after
        setattr(self, at, self._send)

    def _send(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            if self.after == 0:
                os.kill(os.getpid(), self.sent)
            self.after -= 1


OPTIONS: dict[str, Any] = {"max_steps": 6, "seed": 3, "logging_steps": 1}


def trainer_of(folder: Path, *callbacks: Any, **options: Any) -> DPOTrainer:
    return make_trainer(
        folder,
        tiny_llama(attention_dropout=0.1),
        token_pairs(10),
        options={**OPTIONS, "disable_dropout": False, **options},
        eval_dataset=token_pairs(12, seed=5) if options.get("eval_strategy") else None,
        callbacks=list(callbacks),
    )


def stop(folder: Path, callback: Signals, **options: Any) -> StoppedBySignal:
    with pytest.raises(StoppedBySignal) as caught:
        trainer_of(folder, callback, **options).train()
    assert {each: signal.getsignal(each) for each in STARTS} == STARTS
    assert signal.set_wakeup_fd(-1) == -1
    return caught.value


def lines_of(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """The logs of a run, without speeds, which differ."""
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [
        (line.pop("step"), {k: v for k, v in line.items() if "second" not in k and "time" not in k})
        for line in lines
        if "train_runtime" not in line
    ]


def assert_same(resumed: DPOTrainer, unbroken: DPOTrainer) -> None:
    assert history(resumed) == history(unbroken)
    pairs = zip(resumed.model.parameters(), unbroken.model.parameters(), strict=True)
    assert all(torch.equal(own, other) for own, other in pairs)


@pytest.mark.parametrize(
    ("at", "step", "saved"),
    [
        ("on_step_begin", 1, 2),
        pytest.param("on_pre_optimizer_step", 0, 2, marks=pytest.mark.slow),
        pytest.param("on_epoch_end", 3, 4, marks=pytest.mark.slow),
    ],
)
def test_the_resumed_run_is_the_unbroken_one(tmp_path, at, step, saved):
    unbroken = trainer_of(tmp_path / "unbroken")
    unbroken.train()
    stopped = stop(tmp_path, Signals(at, step))
    run = tmp_path / "run"
    assert (stopped.code, stopped.signum) == (143, signal.SIGTERM)
    assert stopped.checkpoint == str(run / f"checkpoint-{saved}")
    assert not {"summary.json", "model.safetensors"} & {path.name for path in run.iterdir()}
    assert len(lines_of(tmp_path)) == saved
    resumed = trainer_of(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed, unbroken)
    assert lines_of(tmp_path) == lines_of(tmp_path / "unbroken")


EVALUATING = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "per_device_eval_batch_size": 1,
    "metric_for_best_model": "loss",
    "load_best_model_at_end": True,
}


@pytest.mark.slow  # each case trains three times
@pytest.mark.parametrize(
    ("strategy", "at", "step", "after", "saved"),
    [
        ("steps", "on_step_begin", 1, 0, 2),  # before an evaluation that is due
        ("steps", "on_prediction_step", 2, 1, 2),  # in the middle of it
        ("steps", "on_evaluate", 2, 0, 2),
        ("steps", "on_save", 2, 0, 2),
        ("steps", "on_step_begin", 2, 0, 3),  # with the third step ends an epoch
        ("epoch", "on_step_begin", 2, 0, 3),
        ("epoch", "on_prediction_step", 3, 1, 3),
        ("epoch", "on_save", 3, 0, 3),
    ],
)
def test_an_evaluation_is_left_to_the_resumed_run(tmp_path, strategy, at, step, after, saved):
    options = {**EVALUATING, "max_steps": 4}
    options |= {"eval_strategy": strategy, "save_strategy": strategy, "logging_strategy": strategy}
    unbroken = trainer_of(tmp_path / "unbroken", EarlyStoppingCallback(3), **options)
    unbroken.train()
    checkpoint = stop(tmp_path, Signals(at, step, after=after), **options).checkpoint
    assert checkpoint == str(tmp_path / "run" / f"checkpoint-{saved}")
    evaluations = [step for step, logs in lines_of(tmp_path) if "eval_loss" in logs]
    earlier = [2] if strategy == "steps" and saved == 3 else []
    assert evaluations == earlier + [saved] * (at in ("on_evaluate", "on_save"))
    resumed = trainer_of(tmp_path, EarlyStoppingCallback(3), **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed, unbroken)
    assert lines_of(tmp_path) == lines_of(tmp_path / "unbroken")
    assert resumed.state.best_metric == unbroken.state.best_metric


def test_a_signal_while_the_reference_is_scored_keeps_what_is_stored(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train_set()

    def score(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)

    trainer.loaders.begin = score
    with pytest.raises(StoppedBySignal) as caught:
        trainer.train()
    assert (caught.value.code, caught.value.checkpoint) == (138, None)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_ctrl_c_saves_once_training_has_begun(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trainer_of(tmp_path, Signals("on_step_begin", 2, signal.SIGINT)).train()
    assert (tmp_path / "run" / "checkpoint-3").is_dir()
    again = trainer_of(tmp_path)
    again.loaders.begin = lambda *_: os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        again.train(resume_from_checkpoint=True)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
def test_a_whole_checkpoint_is_saved_whatever_the_options_say(tmp_path):
    options = {"save_only_model": True, "save_strategy": "steps", "save_steps": 5}
    trainer = trainer_of(tmp_path, Signals("on_step_begin", 2), **options)
    with pytest.raises(StoppedBySignal):
        trainer.train()
    assert trainer.args.save_only_model is True
    assert (tmp_path / "run" / "checkpoint-3" / "optimizer.pt").is_file()


@pytest.mark.slow  # three runs
def test_a_guest_of_an_older_run_that_has_to_save_goes_on(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer_of(tmp_path, **saving).train()
    # With save_strategy: no, it leaves the folder to the older run, until the signal comes.
    stop(tmp_path, Signals("on_step_begin", 3), seed=4)
    again = trainer_of(tmp_path, seed=4)
    again.train(resume_from_checkpoint="auto")
    unbroken = trainer_of(tmp_path / "unbroken", seed=4)
    unbroken.train()
    assert_same(again, unbroken)


def test_without_signals_none_is_caught(tmp_path):
    seen = []

    class Looks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            seen.append({each: signal.getsignal(each) for each in STARTS})

    trainer_of(tmp_path, Looks(), save_on_signal=None, max_steps=1).train()
    assert seen == [STARTS]


def test_handlers_are_back_after_an_error(tmp_path):
    class Fails(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            assert signal.getsignal(signal.SIGTERM) != STARTS[signal.SIGTERM]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trainer_of(tmp_path, Fails()).train()
    assert {each: signal.getsignal(each) for each in STARTS} == STARTS
    assert signal.set_wakeup_fd(-1) == -1
