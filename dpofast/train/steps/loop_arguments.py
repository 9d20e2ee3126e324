"""The options that the Trainer's loop reads while it runs, in place of the user's own."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from dpofast.options.checkpointing import Checkpointing, chooses_layers
from dpofast.options.config import DPOConfig
from dpofast.zero.batch import ShownBatch


class LoopArguments(DPOConfig):
    """A view of the user's DPOConfig in which nothing is accumulated over items of a loader.

    An item holds all micro-batches of its step, so the Trainer's loop must take one item per step.
    It also sees no save_total_limit, which `SavesRun` applies instead, and nothing to be done to
    the model's layers where the trainer does it: no layers of Liger, and no gradient checkpointing
    if that is auto.
    Apart from that, the view and the config are one: a value that a callback sets on either is set
    on both. Logs and checkpoints show the user's values, so the view turns into text, JSON or a
    pickle as if it were the config.

    Args:
        config: the user's options.
        shown_batch: knows the batch sizes that the user gave to DeepSpeed.
    """

    __slots__ = ("config", "shown_batch")  # not in __dict__, which belongs to the config

    def __init__(self, config: DPOConfig, shown_batch: ShownBatch) -> None:
        # The options were checked when `config` was made, so DPOConfig's own __init__ isn't run.
        self.__dict__ = config.__dict__
        self.config, self.shown_batch = config, shown_batch

    @property
    def gradient_accumulation_steps(self) -> int:
        return 1

    @property
    def save_total_limit(self) -> int | None:
        """None: transformers would count damaged checkpoints, and keep a damaged best one only."""
        return None

    @save_total_limit.setter
    def save_total_limit(self, limit: int | None) -> None:
        self.__dict__["save_total_limit"] = limit

    @property
    def use_liger_kernel(self) -> bool:
        """False: transformers would patch the model for good."""
        return False

    @use_liger_kernel.setter
    def use_liger_kernel(self, value: bool) -> None:
        self.__dict__["use_liger_kernel"] = value

    @property
    def gradient_checkpointing(self) -> Checkpointing:
        return self._checkpointing("gradient_checkpointing")

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: Checkpointing) -> None:
        self.__dict__["gradient_checkpointing"] = value

    @property
    def activation_checkpointing(self) -> Checkpointing:
        return self._checkpointing("activation_checkpointing")

    @activation_checkpointing.setter
    def activation_checkpointing(self, value: Checkpointing | None) -> None:
        self.__dict__["activation_checkpointing"] = value

    def _checkpointing(self, name: str) -> Checkpointing:
        if name not in self.__dict__:  # a version of transformers that doesn't have it
            raise AttributeError(name)
        value: Checkpointing = self.__dict__[name]
        return False if chooses_layers(self.config) else value

    def __repr__(self) -> str:
        return repr(self.config)

    __str__ = __repr__

    def to_dict(self) -> dict[str, Any]:
        return self.config.to_dict()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the user's config; `torch.save` puts it into every checkpoint."""
        shown = copy.copy(self.config)
        shown.__dict__.update(self.shown_batch.as_shown())
        # From protocol 2 on, pickle refuses a result whose class isn't that of the pickled object.
        return shown.__reduce_ex__(1)


@contextlib.contextmanager
def one_item_per_step(config: DPOConfig) -> Iterator[LoopArguments]:
    """Inside the `with` block, the Trainer and DeepSpeed take a loader's item for a whole step.

    Yields:
        The arguments to give to the Trainer's loop.
    """
    shown_batch = ShownBatch(config.deepspeed_plugin, config.pairs_per_rank, config.world_size)
    with shown_batch.one_item():
        yield LoopArguments(config, shown_batch)
