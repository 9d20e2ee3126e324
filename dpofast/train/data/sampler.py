"""The optimizer steps of a training run: their order, and how many there are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NoReturn

import numpy as np

from dpofast.data.packing.likelihood import ChosenTokens
from dpofast.data.packing.plan import BatchShape, StepSampler
from dpofast.data.packing.prompt_order import GroupedSampler, PromptOrder
from dpofast.data.packing.token_limit import TokenLimit
from dpofast.errors import ConfigError
from dpofast.options.config import DPOConfig


def train_sampler(
    config: DPOConfig,
    num_pairs: int,
    limit: TokenLimit | None,
    rank: tuple[int, int] | None = None,
    *,
    in_order: bool = False,
    tokens: ChosenTokens | None = None,
    prompts: Callable[[], np.ndarray] | None = None,
    padded_prompts: np.ndarray | None = None,
) -> StepSampler:
    """A sampler of one rank's training steps.

    Args:
        config: options of the run.
        num_pairs: number of pairs in the training set.
        limit: lengths and token limit by which rows are packed; None where rows are padded.
        rank: (rank, world size) to sample for; by default those of this process.
        in_order: keep the order of the pairs, whatever the options say.
        tokens: tokens of the pairs, if the loss has a likelihood term.
        prompts: gives the number of each pair's prompt, [n] int64; group_by_prompt needs it.
        padded_prompts: the same numbers, if padded micro-batches run each answer once.
    """
    number, world_size = rank or (config.process_index, config.world_size)
    shape = BatchShape(
        config.per_device_train_batch_size, config.gradient_accumulation_steps, world_size
    )
    seed = config.seed if config.data_seed is None else config.data_seed
    is_random = config.train_sampling_strategy == "random" and not in_order
    seed = seed if is_random else None
    options = (config.dataloader_drop_last, limit, tokens)
    if not config.group_by_prompt:
        return StepSampler(num_pairs, shape, number, seed, *options, prompts=padded_prompts)
    assert prompts is not None, "streams are refused"
    order = PromptOrder(prompts(), shape.pairs_per_step, seed)
    return GroupedSampler(order, shape, number, *options)


def planned_steps(config: DPOConfig, epoch: StepSampler) -> int:
    """Number of optimizer steps in the whole run.

    Args:
        config: options of the run.
        epoch: sampler of an epoch, from `train_sampler`.

    Raises:
        ConfigError: there is no step to train.
    """
    if not len(epoch):
        refuse_no_step(epoch.num_pairs, epoch.shape.pairs_per_step)
    if config.max_steps > 0:
        return int(config.max_steps)
    return math.ceil(config.num_train_epochs * len(epoch))


def refuse_no_step(num_pairs: int, pairs_per_step: int) -> NoReturn:
    """Raise ConfigError: dataloader_drop_last leaves out all pairs."""
    raise ConfigError(
        f"dataloader_drop_last: {num_pairs} examples don't fill one step of {pairs_per_step}, so "
        "none would be trained; leave it out, or make steps smaller."
    )
