"""Answers to what the Trainer asks of its batches, where a batch is a whole optimizer step."""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments

from dpofast.errors import ConfigError
from dpofast.options.config import DPOConfig


class TakesWholeSteps:
    """Part of a transformers Trainer: it would look for these facts in a dict of tensors."""

    config: DPOConfig

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Pairs of an optimizer step, over all ranks."""
        config = self.config  # the loop's own `args` don't know the accumulation
        pairs_per_rank = config.per_device_train_batch_size * config.gradient_accumulation_steps
        return int(pairs_per_rank * config.world_size)

    def floating_point_ops(self, inputs: Any) -> int:
        """0, as `Throughput` counts the operations."""
        return 0

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Do nothing: the trainer counts tokens itself, padding excluded."""

    def _get_num_items_in_batch(self, batch_samples: Any, device: Any) -> None:
        """None, as the loss is divided by the step's pairs already."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("The loss is computed by compute_pair_loss.")

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        raise ConfigError(
            "hyperparameter_search isn't supported; run dpofast once per setting: the stored "
            "reference log-probs serve all of them."
        )
