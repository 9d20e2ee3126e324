"""The run's data loaders: its pairs with their reference log-probs, laid out step by step."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch.utils.data import DataLoader

from dpofast.data.packing.batch import StepBatch
from dpofast.data.packing.collate import Layout
from dpofast.data.packing.plan import BatchShape, StepSampler, TokenLimit
from dpofast.data.packing.step_dataset import StepDataset, token_limit
from dpofast.options.config import DPOConfig
from dpofast.train.reference import RunReference
from dpofast.train.sampler import train_sampler

logger = logging.getLogger(__name__)

CPU_ROW_TOKENS = 2048  # longer rows are no faster there, and take more memory


class StepLoaders:
    """Makes data loaders whose item is a whole optimizer step of this rank.

    Args:
        config: options.
        layout: of the micro-batches.
        reference: gives the log-probs of a tokenised dataset.
        tokens_that_fit: of a packed row, in this run's memory; the same on every rank.
    """

    def __init__(
        self,
        config: DPOConfig,
        layout: Layout,
        reference: RunReference,
        tokens_that_fit: Callable[[], int],
    ) -> None:
        self.config, self.layout, self.reference = config, layout, reference
        self._tokens_that_fit = tokens_that_fit
        self._row_tokens = config.max_tokens_per_microbatch
        self._ref_logps: dict[int, tuple[Any, Any]] = {}  # id -> dataset, its [n, 2] log-probs
        self._limits: dict[int, tuple[Any, TokenLimit | None]] = {}  # id -> dataset, limit
        self.packing: dict[str, Any] | None = None  # figures of the newest training loader

    @property
    def row_tokens(self) -> int | None:
        """Most tokens of a packed row, settled at the first call; None where rows are padded."""
        if not self.layout.is_packed:
            return None
        if self._row_tokens is None:
            is_cpu = self.config.device.type == "cpu"
            self._row_tokens = CPU_ROW_TOKENS if is_cpu else self._tokens_that_fit()
        return self._row_tokens

    def resume(self, row_tokens: int | None) -> None:
        """Pack as the run did that is resumed, unless the options say how."""
        if row_tokens is not None and self.config.max_tokens_per_microbatch is None:
            self._row_tokens = row_tokens
            self._limits.clear()

    def forget_references(self) -> None:
        """Read log-probs again: the reference has become another one."""
        self._ref_logps.clear()

    def dataset(self, pairs: Any, name: str) -> StepDataset:
        """Tokenised pairs with their reference log-probs; those that are missing are scored."""
        if id(pairs) not in self._ref_logps:
            by_pairs = self.config.precompute_ref_batch_size is not None
            row_tokens = None if by_pairs else self.row_tokens
            self._ref_logps[id(pairs)] = (pairs, self.reference.logps(pairs, name, row_tokens))
        return StepDataset(pairs, self._ref_logps[id(pairs)][1], self.layout)

    def token_limit(self, pairs: Any) -> TokenLimit | None:
        """What the plan of packed rows needs to know; None where rows are padded."""
        if self.row_tokens is None:
            return None
        if id(pairs) not in self._limits:
            self._limits[id(pairs)] = (pairs, token_limit(pairs, self.layout, self.row_tokens))
        return self._limits[id(pairs)][1]

    def train(self, pairs: Any) -> StepLoader:
        sampler = train_sampler(self.config, len(pairs), self.token_limit(pairs))
        figures, limit = sampler.figures(), sampler.limit
        words = "each sequence in a row of its own"
        if figures is not None and limit is not None:
            words = sampler.describe(figures)
            self.packing = {
                "max_tokens": limit.max_tokens,
                **asdict(figures),
                "tokens_saved": limit.saved,
            }
        logger.info("Layout: %s; %s.", self.layout.name, words)
        return self._loader(pairs, "train", sampler)

    def evaluation(self, pairs: Any, name: str) -> StepLoader:
        config = self.config
        shape = BatchShape(config.per_device_eval_batch_size, 1, config.world_size)
        rank, limit = config.process_index, self.token_limit(pairs)
        sampler = StepSampler(len(pairs), shape, rank, seed=None, limit=limit)
        return self._loader(pairs, name, sampler)

    def _loader(self, pairs: Any, name: str, sampler: StepSampler) -> StepLoader:
        config = self.config
        workers = config.dataloader_num_workers
        return StepLoader(
            self.dataset(pairs, name),
            batch_sampler=sampler,
            collate_fn=whole_step,
            num_workers=workers,
            pin_memory=config.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=workers > 0 and config.dataloader_persistent_workers,
            prefetch_factor=config.dataloader_prefetch_factor if workers else None,
        )


class StepLoader(DataLoader[StepBatch]):
    """Passes the Trainer's epoch on to the plan, which plain DataLoaders don't."""

    def set_epoch(self, epoch: int) -> None:
        sampler = self.batch_sampler
        assert isinstance(sampler, StepSampler)
        sampler.set_epoch(epoch)


def whole_step(step: Any) -> Any:
    """The collate function: a step arrives laid out."""
    return step
