"""The part of DPOTrainer that resumes a run at its last step: there is only a model to export."""

from __future__ import annotations

from typing import Any

from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from dpofast.options.config import DPOConfig

# What transformers would report of the steps of this call, of which there are none.
STEP_FIGURES = ("train_loss", "train_samples_per_second", "train_steps_per_second")


class ResumesAtEnd(Trainer):
    """Makes a transformers Trainer load the weights of a finished run without training them on.

    It takes the same path as any resumed run: weights, shards, adapter and the best model are
    loaded in the same way. The loop ends before its first step, and logs nothing.

    Attributes:
        resumed_at_end: whether this call of `train` goes on from the run's last step.
    """

    args: DPOConfig
    resumed_at_end: bool

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # transformers would take a step first, and then look whether it was the last one.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not (self.resumed_at_end and self.is_in_train):
            super().log(logs, start_time)

    def _finalize_training(self, *args: Any, **options: Any) -> TrainOutput:
        output = super()._finalize_training(*args, **options)
        if not self.resumed_at_end:
            return output
        metrics = {k: v for k, v in output.metrics.items() if k not in STEP_FIGURES}
        return TrainOutput(output.global_step, float("nan"), metrics)
