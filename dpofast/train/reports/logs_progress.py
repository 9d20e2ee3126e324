"""The part of DPOTrainer that writes transformers' progress bars as lines in log files."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from dpofast.progress import bars_as_lines


class LogsProgress(Trainer):
    """Mixin whose methods run those of transformers' Trainer, whose bars become lines."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with bars_as_lines():
            return super().train(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with bars_as_lines():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        with bars_as_lines():
            return super().predict(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        with bars_as_lines():
            super().save_model(*args, **kwargs)
