"""The run's data loaders, whose items are whole optimizer steps of this rank."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch.utils.data import DataLoader

from dpofast.data.packing.batch import StepBatch
from dpofast.data.packing.collate import Layout
from dpofast.data.packing.plan import BatchShape, StepSampler
from dpofast.options.config import DPOConfig
from dpofast.train.dataset import RunDataset
from dpofast.train.sampler import train_sampler

logger = logging.getLogger(__name__)

CPU_ROW_TOKENS = 2048  # longer rows are no faster on a CPU, and take more memory


class StepLoader(DataLoader[StepBatch]):
    """Passes the Trainer's epoch on to the plan, which plain DataLoaders don't."""

    def set_epoch(self, epoch: int) -> None:
        sampler = self.batch_sampler
        assert isinstance(sampler, StepSampler)
        sampler.set_epoch(epoch)


def max_row_tokens(config: DPOConfig, measure: Callable[[], int]) -> int:
    """Most tokens of a packed row: what the options say, else what suits the device.

    Args:
        config: options of the run.
        measure: says how many tokens fit a GPU; called only if nothing else decides.
    """
    if config.max_tokens_per_microbatch is not None:
        return int(config.max_tokens_per_microbatch)
    return CPU_ROW_TOKENS if config.device.type == "cpu" else measure()


def train_loader(config: DPOConfig, dataset: RunDataset, layout: Layout) -> StepLoader:
    """A loader of this rank's training steps; `dataset` is scored and planned."""
    assert dataset.plan is not None, "the steps are planned first"
    # A copy, as the loader moves its plan on from epoch to epoch.
    return _loader(config, dataset, layout, copy.copy(dataset.plan))


def evaluation_loader(config: DPOConfig, dataset: RunDataset, layout: Layout) -> StepLoader:
    """A loader of this rank's evaluation steps, in the dataset's order; `dataset` is scored."""
    shape = BatchShape(config.per_device_eval_batch_size, 1, config.world_size)
    limit = dataset.token_limit
    plan = StepSampler(len(dataset), shape, config.process_index, seed=None, limit=limit)
    return _loader(config, dataset, layout, plan)


def plan_training(config: DPOConfig, dataset: RunDataset, layout: Layout) -> None:
    """Plan this rank's training steps, and log how well they are packed."""
    plan = dataset.plan = train_sampler(config, len(dataset), dataset.token_limit)
    figures = plan.figures()  # None where rows are padded
    packing = "each sequence in a row of its own" if figures is None else plan.describe(figures)
    logger.info("Layout: %s; %s.", layout.name, packing)


def packing_summary(plan: StepSampler | None) -> dict[str, Any] | None:
    """How well training steps are packed; None where rows are padded, or nothing is planned."""
    figures = None if plan is None else plan.figures()
    if plan is None or plan.limit is None or figures is None:
        return None
    limit = plan.limit
    return {"max_tokens": limit.max_tokens, **asdict(figures), "tokens_saved": limit.saved}


def whole_step(step: Any) -> Any:
    """The collate function, which has nothing to do: a step arrives laid out."""
    return step


def _loader(
    config: DPOConfig, dataset: RunDataset, layout: Layout, plan: StepSampler
) -> StepLoader:
    workers = config.dataloader_num_workers
    return StepLoader(
        dataset.steps(layout),
        batch_sampler=plan,
        collate_fn=whole_step,
        num_workers=workers,
        pin_memory=config.dataloader_pin_memory and torch.cuda.is_available(),
        persistent_workers=workers > 0 and config.dataloader_persistent_workers,
        prefetch_factor=config.dataloader_prefetch_factor if workers else None,
    )
