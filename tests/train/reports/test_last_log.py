"""The steps since the last log are logged when training ends, whatever ends it."""

from __future__ import annotations

import json

import pytest
from transformers import TrainerCallback

from dpofast.monitor.callbacks import METRICS_FILE
from tests.support import make_trainer, token_pairs

METRICS = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "logps/chosen")
SIZES = [4, 4, 2, 4, 4, 2]  # pairs of each step: ten pairs in an epoch


def logs_of(trainer):
    return [log for log in trainer.state.log_history if "grad_norm" in log]


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("every"))
    trainer.train()
    return logs_of(trainer)


def mean(logs, first, last, metric):
    """Over the pairs of steps `first` to `last`, from the logs of single steps."""
    steps = range(first - 1, last)
    return sum(SIZES[step] * logs[step][metric] for step in steps) / sum(SIZES[first - 1 : last])


@pytest.mark.parametrize(
    ("options", "spans"),
    [
        ({"logging_steps": 10}, [(1, 6)]),
        ({"logging_steps": 0.5}, [(1, 3), (4, 6)]),
        ({"logging_steps": 5, "logging_first_step": True}, [(1, 1), (2, 5), (6, 6)]),
        ({"logging_strategy": "epoch", "max_steps": 5}, [(1, 3), (4, 5)]),
        ({"logging_strategy": "no"}, []),
    ],
)
def test_each_log_has_the_means_over_the_pairs_since_the_log_before(
    tmp_path, every, options, spans
):
    trainer = make_trainer(tmp_path, options=options)
    output = trainer.train()
    logs = logs_of(trainer)
    assert [log["step"] for log in logs] == [last for _, last in spans]
    for log, span in zip(logs, spans, strict=True):
        for metric in METRICS:
            assert log[metric] == pytest.approx(mean(every, *span, metric), abs=1e-6), metric
    losses = [log["loss"] for log in every[: trainer.state.global_step]]
    assert output.training_loss == pytest.approx(sum(losses) / len(losses), abs=1e-6)
    written = (tmp_path / "run" / METRICS_FILE).read_text().splitlines()
    assert sum("rewards/margins" in json.loads(line) for line in written) == len(spans)


def test_the_last_log_comes_before_the_last_evaluation_and_checkpoint(tmp_path, every):
    options = {"logging_steps": 10, "eval_strategy": "steps", "eval_steps": 10}
    options |= {"save_strategy": "steps", "save_steps": 4}
    held_out = token_pairs(2, seed=4)
    trainer = make_trainer(tmp_path, options=options, eval_dataset=held_out)
    trainer.train()
    training, evaluation, whole = trainer.state.log_history
    assert "rewards/margins" in training
    assert "eval_rewards/margins" in evaluation
    assert "train_loss" in whole
    state = json.loads((tmp_path / "run" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["log_history"] == [training, evaluation]
    # The sums of the steps before are part of the checkpoint, so a resumed run logs the same.
    again = make_trainer(tmp_path, options=options, eval_dataset=held_out)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    (log,) = logs_of(again)
    assert log["step"] == 6
    for metric in METRICS:
        assert log[metric] == training[metric], metric


@pytest.mark.parametrize("event", ["on_step_end", "on_evaluate"])
def test_a_callback_that_ends_training(tmp_path, every, event):
    def stop(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 5

    options = {"logging_steps": 3, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(
        tmp_path,
        options=options,
        eval_dataset=token_pairs(2, seed=4),
        callbacks=[type("Stop", (TrainerCallback,), {event: stop})()],
    )
    trainer.train()
    assert [log["step"] for log in logs_of(trainer)] == [3, 5]
    expected = mean(every, 4, 5, "rewards/margins")
    assert logs_of(trainer)[1]["rewards/margins"] == pytest.approx(expected, abs=1e-6)
