"""The options that the Trainer's loop reads while it runs, in place of the user's own."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from dpofast.options.config import DPOConfig
from dpofast.zero.batch import ShownBatch


class LoopArguments(DPOConfig):
    """A DPOConfig under which one item of the loader is one optimizer step.

    An item holds all micro-batches of its step, so the Trainer's loop must not accumulate over
    several items. Logs and checkpoints must still show the user's values, so this object turns into
    JSON or a pickle as if it were the user's config.

    Args:
        config: the user's options; not changed.
        shown_batch: knows the batch sizes that the user gave to DeepSpeed.
    """

    def __init__(self, config: DPOConfig, shown_batch: ShownBatch) -> None:
        # The options were checked when `config` was made, so DPOConfig's own __init__ isn't run.
        self.__dict__.update(config.__dict__)
        self.gradient_accumulation_steps = 1
        self._config, self._shown_batch = config, shown_batch

    def to_dict(self) -> dict[str, Any]:
        return self._config.to_dict()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the user's config; `torch.save` puts it into every checkpoint."""
        shown = copy.copy(self._config)
        shown.__dict__.update(self._shown_batch.as_shown())
        # From protocol 2 on, pickle refuses a result whose class isn't that of the pickled object.
        return shown.__reduce_ex__(1)


@contextlib.contextmanager
def one_item_per_step(config: DPOConfig) -> Iterator[LoopArguments]:
    """Inside the `with` block, the Trainer and DeepSpeed take a loader's item for a whole step.

    Yields:
        The arguments to give to the Trainer's loop.
    """
    pairs_per_rank = config.per_device_train_batch_size * config.gradient_accumulation_steps
    shown_batch = ShownBatch(config.deepspeed_plugin, pairs_per_rank, config.world_size)
    with shown_batch.one_item():
        yield LoopArguments(config, shown_batch)
