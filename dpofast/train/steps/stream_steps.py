"""The data loader of a run over a stream, whose items are optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import Dataset, Sampler

from dpofast.data.packing.batch import StepBatch
from dpofast.data.packing.collate import Layout
from dpofast.train.data.stream import RunStream, Window


class StreamSteps(Dataset[StepBatch]):
    """Lays out this rank's part of the steps of a stream, by their number in the run.

    Args:
        stream: the training set.
        ready: scores the pairs of a window and plans its steps, if that isn't done yet.
        layout: layout of the micro-batches.
        ld_alpha: as in StepDataset.
    """

    def __init__(
        self,
        stream: RunStream,
        ready: Callable[[Window], None],
        layout: Layout,
        ld_alpha: float | None = None,
    ) -> None:
        self.stream, self.layout, self.ld_alpha = stream, layout, ld_alpha
        self._ready = ready

    def __len__(self) -> int:
        """Pairs of the whole run, which transformers' Trainer logs."""
        return self.stream.num_steps * self.stream.pairs_per_step

    def __getitem__(self, step: int) -> StepBatch:
        return self.__getitems__(step)

    def __getitems__(self, step: int) -> StepBatch:
        """One step; PyTorch's fetcher passes what the batch sampler yields."""
        window = self.stream.window(step)
        self.stream.next_step = step + 1
        self._ready(window)
        dataset = window.dataset
        assert dataset.plan is not None, "a window that is ready has a plan"
        planned = dataset.plan.step(step - window.first_step)
        return dataset.step_dataset(self.layout, self.ld_alpha).__getitems__(planned)


class StepNumbers(Sampler[Any]):
    """Batch sampler for a DataLoader: yields the numbers of all steps of a run."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.num_steps))
