"""Callbacks for transformers' Trainer: a file of all logs, and a log of the last steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from dpofast.monitor.guard import ReportGuard

METRICS_FILE = "metrics.jsonl"


class MetricsFile(TrainerCallback):
    """Appends every log event to metrics.jsonl as one JSON object a line: step, epoch, values.

    A file that can't be written is one warning, and doesn't end the run.
    """

    def __init__(self) -> None:
        # Lines that this process has written belong to its run, even those of an evaluation before
        # training. Older lines belong to it only if it resumes.
        self._has_written = False
        self._guard = ReportGuard()

    def begin_new_run(self, folder: str | Path) -> None:
        """Delete an older run's file. A run that goes on from another's checkpoint is new, too.

        Args:
            folder: output folder of the run.
        """
        if not self._has_written:
            with self._guard(METRICS_FILE):
                (Path(folder) / METRICS_FILE).unlink(missing_ok=True)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Drops the lines that a resumed run will write again, or all lines of an older run."""
        path = Path(args.output_dir) / METRICS_FILE
        if not state.is_world_process_zero or not path.is_file():
            return
        with self._guard(METRICS_FILE):
            self._drop_lines(path, state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Appends one line; the first of a run that doesn't resume begins a new file."""
        if not state.is_world_process_zero:
            return
        with self._guard(METRICS_FILE):
            path = Path(args.output_dir) / METRICS_FILE
            line = json.dumps({"step": state.global_step, **(logs or {})}, default=str)
            if not self._has_written and not state.global_step:
                path.unlink(missing_ok=True)  # an older run's file
            self._has_written = True
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")

    def _drop_lines(self, path: Path, step: int) -> None:
        lines = path.read_text(encoding="utf-8").splitlines()
        # A killed run may have left half a line at the end.
        whole = [line for line in lines if line.endswith("}")]
        is_resumed = step > 0
        kept = [
            line
            for line in whole
            if (is_resumed or self._has_written) and json.loads(line)["step"] <= step
        ]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


class LogsLastSteps(TrainerCallback):
    """Logs at the last step, too, if training ends between two logs of `logging_steps`.

    Whatever ends training, the pairs since the last log would be in no log otherwise. The Trainer
    doesn't log a step twice.
    """

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Asks for a log at the last step, before its evaluation and its checkpoint."""
        if args.logging_strategy == IntervalStrategy.STEPS and control.should_training_stop:
            control.should_log = True

    # Another callback may have ended training after the last step's log.
    on_epoch_end = on_step_end
