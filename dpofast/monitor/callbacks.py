"""Files that a run writes as it goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

METRICS_FILE = "metrics.jsonl"


class MetricsFile(TrainerCallback):
    """Appends every log event to metrics.jsonl, one JSON object a line: step, epoch, values."""

    def __init__(self) -> None:
        self._has_written = False  # an evaluation before training belongs to the run

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Drop the lines that a resumed run writes again, or all that an older run left."""
        path = Path(args.output_dir) / METRICS_FILE
        if not state.is_world_process_zero or not path.is_file():
            return
        lines = path.read_text(encoding="utf-8").splitlines()
        # a killed run may have left half a line at the end
        whole = [line for line in lines if line.endswith("}")]
        is_resumed = state.global_step > 0
        kept = [
            line
            for line in whole
            if (is_resumed or self._has_written) and json.loads(line)["step"] <= state.global_step
        ]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero:
            return
        path = Path(args.output_dir) / METRICS_FILE
        if not self._has_written and not state.global_step:
            path.unlink(missing_ok=True)  # of an older run
        self._has_written = True
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")
