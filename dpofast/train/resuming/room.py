"""Compares the room on the disk with what the saves of a run need, before anything is trained."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer_utils import SaveStrategy

from dpofast.errors import ConfigError
from dpofast.model.parts import is_peft_model, num_bytes, numel
from dpofast.options.config import DPOConfig
from dpofast.train.checkpoint.space import free_bytes

# States of the optimizers whose states are as large as the weights, for each trained one.
MOMENTS = {"adamw_torch": 2, "adamw_torch_fused": 2, "adamw_hf": 2, "adamw_apex_fused": 2}
# DeepSpeed's states are a copy of each trained weight and the optimizer's, all in float32.
FLOAT32_BYTES = 4
DEEPSPEED_ADAM = ("adam", "adamw")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaveSize:
    """Bytes that saves take.

    Attributes:
        model: of the exported model; of an adapter, only its own.
        least: of a checkpoint, at least.
        likely: of a checkpoint, about; small files aren't counted.
    """

    model: int
    least: int
    likely: int


def save_size(model: nn.Module, config: DPOConfig, has_own_optimizer: bool = False) -> SaveSize:
    """What the saves of a run take.

    Args:
        model: the policy.
        config: options of the run.
        has_own_optimizer: whether a script has made the optimizer, whose states aren't known.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    saved = trained if is_peft_model(model) else list(model.parameters())
    weights = _total(saved)
    if config.save_only_model:
        return SaveSize(weights, weights, weights)
    moments = 0 if has_own_optimizer else MOMENTS.get(str(getattr(config.optim, "value", "")), 0)
    if config.deepspeed_plugin is not None:
        optimizer = config.deepspeed_plugin.deepspeed_config.get("optimizer")
        if optimizer is not None:
            moments = 2 if str(optimizer.get("type", "")).lower() in DEEPSPEED_ADAM else 0
        states = (1 + moments) * FLOAT32_BYTES * sum(map(numel, trained))
        # A node that saves for itself has the states of its own ranks, of which there may be one.
        own = states // config.world_size if config.save_on_each_node else states
        return SaveSize(weights, weights + own, 2 * weights + states)
    size = weights + moments * _total(trained)
    return SaveSize(weights, size, size)


def check_room(
    folder: Path,
    size: SaveSize,
    config: DPOConfig,
    num_steps: int,
    *,
    have: int = 0,
    exports: bool = False,
) -> None:
    """Compare the free space of the output folder's disk with what the run's saves need.

    Args:
        folder: output folder, which exists.
        size: what a save takes.
        config: options of the run.
        num_steps: optimizer steps of the whole run; 0 if all are done, so that no checkpoint will
            be saved.
        have: checkpoints of the run that are there already.
        exports: whether the model is sure to be saved at the end, as a command does.

    Raises:
        ConfigError: a checkpoint doesn't fit, or a model that is sure to be saved.
    """
    try:
        free = free_bytes(folder)
    except OSError as error:
        logger.info("It isn't known how much room there is at %s: %s.", folder, error.strerror)
        return
    saves = config.save_strategy != SaveStrategy.NO and num_steps > 0
    if saves and free < size.least:
        raise ConfigError(
            f"output_dir: a checkpoint of this run takes {size.least:,} bytes or more, and "
            f"{free:,} bytes are free at {str(folder)!r}; make room, name a folder on another "
            "disk, or set save_strategy: no."
        )
    if exports and free < size.model:
        raise ConfigError(
            f"output_dir: the model takes {size.model:,} bytes, and {free:,} bytes are free at "
            f"{str(folder)!r}; make room, or name a folder on another disk."
        )
    most = most_checkpoints(config, num_steps) if saves else 0
    needed = max(0, most - have) * size.likely + size.model
    if free >= needed:
        return
    parts = f"the model {size.model:,}"
    if most:
        parts = f"{most:,} checkpoints at once, each about {size.likely:,}, and {parts}"
    logger.warning(
        "output_dir: the saves of this run need about %s bytes (%s), and %s bytes are free at %s; "
        "make room, or name a folder on another disk%s.",
        *(f"{needed:,}", parts, f"{free:,}", folder),
        ", or set or lower save_total_limit" if most > 2 else "",
    )


def most_checkpoints(config: DPOConfig, num_steps: int) -> int:
    """The most checkpoints that are there at once, the one that is being written included.

    An old one is deleted only when the new one is whole.
    """
    total = _num_saves(config, num_steps)
    limit = config.save_total_limit
    if not limit or limit < 0:
        return total
    kept = max(limit, 2 if config.load_best_model_at_end else 1)  # the best one and the last
    return min(total, kept + 1)


def _num_saves(config: DPOConfig, num_steps: int) -> int:
    """The most checkpoints that a run saves; 1 if that isn't known."""
    if config.save_strategy == SaveStrategy.EPOCH:
        return 1 if config.max_steps > 0 else math.ceil(config.num_train_epochs)
    every: Any = config.save_steps
    if config.save_strategy == SaveStrategy.BEST:
        every = config.eval_steps or every
    every = max(1, math.ceil(every * num_steps) if every < 1 else int(every))
    return math.ceil(num_steps / every)


def _total(parameters: Iterable[Any]) -> int:
    return sum(map(num_bytes, parameters))
