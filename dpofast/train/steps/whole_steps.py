"""Overrides the Trainer's methods that look into a batch, because our batch is a whole step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainingArguments

from dpofast.data.packing.prompt_order import GroupedSampler
from dpofast.errors import ConfigError
from dpofast.options.config import DPOConfig
from dpofast.train.data.training_set import TrainingSet
from dpofast.train.steps.loop_arguments import LoopArguments


class TakesWholeSteps:
    """Makes a transformers Trainer, which expects dicts of tensors as batches, accept whole steps.

    This class comes before Trainer among the bases of DPOTrainer, so that its methods win.
    """

    args: DPOConfig
    train_dataset: Any
    train_set: Callable[[], TrainingSet]

    @property
    def user_args(self) -> DPOConfig:
        """The options as the user gave them, also while the Trainer's loop reads a view of them."""
        return self.args.config if isinstance(self.args, LoopArguments) else self.args

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """The number of pairs in an optimizer step on all ranks; the mean if steps differ by plan.

        transformers logs it, and computes train_samples_per_second from it if max_steps is set.
        """
        plan = None if self.train_dataset is None else self.train_set().plan
        if isinstance(plan, GroupedSampler):
            return round(plan.mean_pairs())
        # While the loop runs, gradient_accumulation_steps is 1 in `args`.
        return self.user_args.pairs_per_rank * int(self.user_args.world_size)

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0, because `Throughput` counts the operations instead."""
        return 0

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Do nothing: the trainer counts tokens itself, padding excluded."""

    def _get_num_items_in_batch(self, batch_samples: Any, device: Any) -> None:
        """Return None, because our loss is divided by the step's pairs already."""

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        raise ConfigError(
            "hyperparameter_search isn't supported; run dpofast once per setting: the stored "
            "reference log-probs serve all of them."
        )
