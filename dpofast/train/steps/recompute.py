"""Chooses how many layers recompute their activations in the backward, by the memory they need."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from dpofast.model.parts import causal_lm, checkpointable_layers, num_layers
from dpofast.options.checkpointing import checkpointing_options, chooses_layers
from dpofast.options.config import DPOConfig
from dpofast.train.data.stream import RunStream
from dpofast.train.data.training_set import TrainingSet
from dpofast.train.steps.memory import (
    USED_SHARE,
    BodyBytes,
    body_bytes,
    bytes_for_rows,
    free_device_bytes,
    row_tokens_on_all_ranks,
)
from dpofast.zero.blocks import runnable

logger = logging.getLogger(__name__)

# Rows of so many tokens keep a GPU busy. Longer ones gain less than recomputation costs, so layers
# are checkpointed for rows of this length, or for the longest pair.
BUSY_ROW = 2**13


class Recomputation:
    """The layers of a run that recompute their activations, where gradient_checkpointing is auto.

    The first layers do. Their backward comes last, when the activations of the others are gone.

    Args:
        trainer: a DPOTrainer.

    Attributes:
        layers: how many layers recompute; None until that is settled, and where the options say it.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.layers: int | None = None

    def row_tokens(self) -> int:
        """The most tokens of a packed row that fit the GPU of every rank; for `StepLoaders`."""
        chosen = self._on_all_ranks(None) if chooses_layers(self.trainer.args) else None
        return row_tokens_on_all_ranks(self.trainer, chosen)

    def settle(self, row_tokens: int | None, recorded: int | None = None) -> None:
        """Choose the number of layers, the same on all ranks; all ranks call this together.

        A later call changes nothing, except that a recorded number replaces the one in use.

        Args:
            row_tokens: most tokens of a packed row; None where rows are padded.
            recorded: number in the checkpoint that is resumed; None if there is none.
        """
        config = self.trainer.args
        if not chooses_layers(config):
            self.layers = None
            return
        before = self.layers
        if recorded is not None:
            self.layers = recorded
        elif before is None:
            self.layers = self._on_all_ranks(row_tokens)
        if config.should_log and self.layers != before:
            text = "gradient_checkpointing: auto: %d of %d layers recompute their activations."
            logger.info(text, self.layers, num_layers(self.trainer.model))

    def apply(self) -> None:
        """Make the chosen layers recompute, before the model is wrapped for training."""
        if self.layers is not None:
            options = checkpointing_options(self.trainer.args)
            checkpoint_layers(self.trainer.model, self.layers, options)

    def _on_all_ranks(self, row_tokens: int | None) -> int:
        """The most layers that any rank needs to checkpoint.

        Args:
            row_tokens: most tokens of a packed row; None if that isn't settled.
        """
        trainer = self.trainer
        with runnable(trainer):  # ZeRO-3 has no engine for the model yet
            own = self._needed(row_tokens)
        needed = torch.tensor([own], device=trainer.args.device)
        return int(trainer.accelerator.gather(needed).max())

    def _needed(self, row_tokens: int | None) -> int:
        trainer = self.trainer
        model, config, layout = trainer.model, trainer.args, trainer.layout
        if not getattr(causal_lm(model), "supports_gradient_checkpointing", True):
            return 0
        free = free_bytes(config.device)
        if free is None:  # nothing is known, so memory is what counts
            return num_layers(model)
        train_set = None if trainer.train_dataset is None else trainer.train_set()
        wanted = wanted_tokens(train_set, layout, config, row_tokens)
        body = body_bytes(model, layout, trainer.accelerator.autocast)
        left = bytes_for_rows(model, config, free) - body.fixed
        is_divisible = bool(single_layers(model))
        return layers_to_checkpoint(body, USED_SHARE * left, wanted, is_divisible=is_divisible)


def free_bytes(device: torch.device) -> int | None:
    """Bytes that a device has left; None for a CPU, whose memory other processes use as well."""
    return None if device.type == "cpu" else free_device_bytes(device)


def layers_to_checkpoint(
    body: BodyBytes, free: float, tokens: int, *, is_divisible: bool = True
) -> int:
    """The fewest layers to checkpoint so that a row fits.

    Args:
        body: bytes of a token in each layer.
        free: bytes for the row.
        tokens: tokens of the row.
        is_divisible: whether some layers can be checkpointed without the others.

    Returns:
        The number of layers; all of them if not even that is enough.
    """
    counts = range(body.num_layers) if is_divisible else range(1)
    fitting = (each for each in counts if tokens * body.of_row(each).per_token <= free)
    return next(fitting, body.num_layers)


def wanted_tokens(
    train_set: TrainingSet | None, layout: Any, config: DPOConfig, row_tokens: int | None
) -> int:
    """The tokens of the longest micro-batch that is planned for.

    Args:
        train_set: the training pairs; None if nothing is trained.
        layout: layout of the micro-batches.
        config: options of the run.
        row_tokens: most tokens of a packed row; None if that isn't settled, or rows are padded.
    """
    longest = _longest(train_set, layout, config)
    if not layout.is_packed:
        return 2 * config.per_device_train_batch_size * (longest or BUSY_ROW)
    row = row_tokens or config.max_tokens_per_microbatch or BUSY_ROW
    return max(row, longest or 0)  # a pair that is longer than a row gets one of its own


def _longest(train_set: TrainingSet | None, layout: Any, config: DPOConfig) -> int | None:
    """Tokens of the longest pair, or in padded rows of the longest sequence; None if not known."""
    if train_set is None or isinstance(train_set, RunStream) or not layout.is_packed:
        sequences = 2 if layout.is_packed else 1
        return None if config.max_length is None else sequences * config.max_length
    if train_set.token_limit is None:
        train_set.measure_lengths(layout, BUSY_ROW)
    assert train_set.token_limit is not None
    return max(train_set.token_limit.lengths)


def single_layers(model: nn.Module) -> list[Any]:
    """The decoder layers in their order, if transformers can checkpoint them one by one."""
    found = checkpointable_layers(model)
    return found if len(found) == num_layers(model) else []


def checkpoint_layers(model: Any, count: int, options: dict[str, Any]) -> None:
    """Checkpoint the first layers of a model, and no others.

    Args:
        model: causal LM or PeftModel.
        count: number of layers.
        options: arguments of checkpointing, as transformers takes them.

    Raises:
        ValueError: transformers can't checkpoint the layers of this model.
    """
    if count:
        arguments = dict(options)
        offload = {"offload": True} if arguments.pop("offload", False) else {}
        # transformers 5.23 renamed the method.
        old = "gradient_checkpointing_enable"
        enable = getattr(model, old.replace("gradient", "activation"), None) or getattr(model, old)
        enable(arguments or None, **offload)
        others = single_layers(model)[count:]
    else:
        others = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]
    for module in others:
        module.gradient_checkpointing = False
