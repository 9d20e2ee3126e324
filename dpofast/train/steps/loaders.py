"""The run's data loaders, whose items are whole optimizer steps of this rank."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from dpofast.data.packing.batch import StepBatch
from dpofast.data.packing.collate import Layout
from dpofast.data.packing.likelihood import ChosenTokens
from dpofast.data.packing.plan import BatchShape, StepSampler
from dpofast.data.packing.prompt_order import GroupedSampler
from dpofast.options.config import DPOConfig
from dpofast.options.save_signals import watched_signals
from dpofast.train.data.dataset import RunDataset, log_report
from dpofast.train.data.sampler import train_sampler
from dpofast.train.data.stream import RunStream, Window
from dpofast.train.data.training_set import TrainingSet
from dpofast.train.reference.run_reference import RunReference
from dpofast.train.signals.watch import ignore_signals
from dpofast.train.steps.stream_steps import StepNumbers, StreamSteps

logger = logging.getLogger(__name__)

CPU_ROW_TOKENS = 2048  # longer rows are no faster on a CPU, and take more memory


class StepLoader(DataLoader[StepBatch]):
    """Passes the Trainer's epoch on to the plan, which plain DataLoaders don't.

    Attributes:
        run_dataset: the dataset whose steps it gives.
    """

    run_dataset: RunDataset | None = None

    def set_epoch(self, epoch: int) -> None:
        sampler = self.batch_sampler
        assert isinstance(sampler, StepSampler)
        sampler.set_epoch(epoch)


def max_row_tokens(config: DPOConfig, measure: Callable[[], int]) -> int:
    """Most tokens in a packed row: what the options say, otherwise what suits the device.

    Args:
        config: options of the run.
        measure: says how many tokens fit a GPU; called only if nothing else decides.
    """
    if config.max_tokens_per_microbatch is not None:
        return int(config.max_tokens_per_microbatch)
    return CPU_ROW_TOKENS if config.device.type == "cpu" else measure()


class StepLoaders:
    """Takes the run's datasets from prepared to planned, and makes their data loaders.

    Args:
        config: options of the run.
        layout: layout of the micro-batches.
        reference: scores the datasets.
        measure: says how many tokens of a packed row fit this run's GPUs; the same on every rank.

    Attributes:
        row_tokens: most tokens of a packed row; None until it is settled, and where rows are
            padded.
    """

    def __init__(
        self,
        config: DPOConfig,
        layout: Layout,
        reference: RunReference,
        measure: Callable[[], int],
    ) -> None:
        self.config, self.layout, self.reference = config, layout, reference
        self._measure = measure
        self.row_tokens: int | None = None

    def settle(self, recorded: int | None = None) -> None:
        """Fix the run's reference and the length of packed rows.

        A later call changes neither, except that a recorded length replaces the one in use.

        Args:
            recorded: length of packed rows from the checkpoint that is resumed; None if there is
                none. It is ignored if the options set a length.
        """
        self.reference.settle()
        if not self.layout.is_packed:
            return
        if recorded is not None and self.config.max_tokens_per_microbatch is None:
            self.row_tokens = recorded
        elif self.row_tokens is None:
            self.row_tokens = max_row_tokens(self.config, self._measure)

    def score(self, dataset: RunDataset, rescore: bool = False) -> None:
        """Give a dataset its reference log-probs; see `RunReference.score`."""
        by_pairs = self.config.precompute_ref_batch_size is not None
        self.reference.score(dataset, None if by_pairs else self.row_tokens, rescore)

    def score_all(self, train_set: TrainingSet, rescore: bool = False) -> None:
        """Give a training set its reference log-probs; of a stream, the pairs of all its steps.

        The stream is read a window at a time, and at most once: when it begins again, it has given
        all its pairs. Its first window is planned, too.
        """
        if not isinstance(train_set, RunStream):
            self.score(train_set, rescore)
            return
        for window in train_set.first_pass():
            self.score(window.dataset, rescore)
            if train_set.plan is None:
                self._make_ready(train_set, window)
        if self.config.should_log:
            log_report(train_set.report)

    def begin(self, train_set: TrainingSet, first_step: int = 0) -> None:
        """Score a training set and plan its steps; of a stream, those of the first window.

        Args:
            train_set: the training set.
            first_step: the step from which the run goes on; only a stream is read from there.
        """
        if isinstance(train_set, RunStream):
            window = train_set.window(first_step)
            # The reference and the length of rows may be others than when it was made ready.
            train_set.plan = window.dataset.plan = None
            self._make_ready(train_set, window)
        else:
            self.score(train_set)
            self.plan(train_set)

    def plan(self, dataset: RunDataset, quietly: bool = False) -> None:
        """Plan this rank's training steps, and log how well they are packed, unless `quietly`."""
        dataset.measure_lengths(self.layout, self.row_tokens)
        plan = train_sampler(
            self.config,
            len(dataset),
            dataset.token_limit,
            in_order=dataset.is_window,
            tokens=self._tokens_of(dataset),
            prompts=dataset.prompts,
            padded_prompts=dataset.padded_prompts(self.layout),
        )
        dataset.plan = plan
        if quietly:
            return
        figures = plan.figures()  # None where rows are padded
        packing = "each sequence in a row of its own" if figures is None else plan.describe(figures)
        logger.info("Layout: %s; %s.", self.layout.name, packing)
        if isinstance(plan, GroupedSampler):
            logger.info("group_by_prompt: %s.", plan.describe_order())

    def training(self, dataset: TrainingSet) -> DataLoader[StepBatch]:
        """A loader of the training steps of a dataset that is scored and planned.

        The windows of a stream are scored and planned when their first step is asked for.
        """
        if isinstance(dataset, RunStream):
            ready, ld_alpha = partial(self._make_ready, dataset), self.reference.store.ld_alpha
            steps = StreamSteps(dataset, ready, self.layout, ld_alpha)
            numbers = StepNumbers(dataset.num_steps)
            # Worker processes would each read the stream, and can't score.
            return DataLoader(
                steps, batch_sampler=numbers, collate_fn=whole_step, pin_memory=self._pins
            )
        assert dataset.plan is not None, "the steps are planned first"
        # The loader gets a copy, because it sets the epoch of its plan.
        return self._loader(dataset, copy.copy(dataset.plan))

    def evaluation(self, dataset: RunDataset) -> StepLoader:
        """A loader of the evaluation steps of a scored dataset, in the dataset's order."""
        config = self.config
        dataset.measure_lengths(self.layout, self.row_tokens)
        shape = BatchShape(config.per_device_eval_batch_size, 1, config.world_size)
        plan = StepSampler(
            len(dataset),
            shape,
            config.process_index,
            seed=None,
            limit=dataset.token_limit,
            tokens=self._tokens_of(dataset),
            over_all=True,
            prompts=dataset.padded_prompts(self.layout),
        )
        return self._loader(dataset, plan)

    def _tokens_of(self, dataset: RunDataset) -> ChosenTokens | None:
        """The tokens of the pairs, if a likelihood term takes a mean over them."""
        return dataset.chosen_tokens() if self.config.likelihood() else None

    def _make_ready(self, stream: RunStream, window: Window) -> None:
        """Score and plan a window, unless it is ready; the first one is logged and reported."""
        dataset = window.dataset
        if dataset.plan is not None:
            return
        self.score(dataset)
        self.plan(dataset, quietly=stream.plan is not None)
        stream.plan = stream.plan or dataset.plan

    @property
    def _pins(self) -> bool:
        return bool(self.config.dataloader_pin_memory and torch.cuda.is_available())

    def _loader(self, dataset: RunDataset, plan: StepSampler) -> StepLoader:
        config = self.config
        workers = config.dataloader_num_workers
        loader = StepLoader(
            dataset.step_dataset(self.layout, self.reference.store.ld_alpha),
            batch_sampler=plan,
            collate_fn=whole_step,
            num_workers=workers,
            pin_memory=self._pins,
            persistent_workers=workers > 0 and config.dataloader_persistent_workers,
            prefetch_factor=config.dataloader_prefetch_factor if workers else None,
            worker_init_fn=partial(ignore_signals, watched_signals(config.save_on_signal)),
        )
        loader.run_dataset = dataset
        return loader


def packing_summary(plan: StepSampler | None) -> dict[str, Any] | None:
    """How well training steps are packed; None where rows are padded, or nothing is planned."""
    figures = None if plan is None else plan.figures()
    if plan is None or plan.limit is None or figures is None:
        return None
    max_tokens = plan.limit.max_tokens
    return {"max_tokens": max_tokens, **asdict(figures), "tokens_saved": figures.saved}


def whole_step(step: Any) -> Any:
    """The collate function, which has nothing to do: a step arrives laid out."""
    return step
