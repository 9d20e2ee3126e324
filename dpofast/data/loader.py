"""Data loaders of the trainer: one item is one optimizer step of this rank."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from dpofast.data.batch import PackedPairs, StepBatch, collate_padded
from dpofast.data.plan import MicroBatch, PlannedStep, StepSampler


class StepDataset(Dataset[StepBatch]):
    """Tokenised pairs with their reference log-probs, indexed by planned steps.

    Args:
        pairs: datasets.Dataset with int lists prompt_ids, chosen_ids, rejected_ids.
        ref_logps: [n, 2] fp64, chosen and rejected of each pair, in nats.
        pad_token_id: fills the rows' ends.
    """

    def __init__(self, pairs: Any, ref_logps: np.ndarray, pad_token_id: int) -> None:
        self.pairs = pairs.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
        self.ref_logps, self.pad_token_id = ref_logps, pad_token_id

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> StepBatch:
        return self.__getitems__(PlannedStep(([index],), 1))

    def __getitems__(self, step: PlannedStep) -> StepBatch:
        """Lay out one step; PyTorch's fetcher calls this with what the batch sampler yields."""
        return StepBatch([self._lay_out(batch) for batch in step.micro_batches], step.num_pairs)

    def _lay_out(self, batch: MicroBatch) -> PackedPairs:
        if not batch:
            return collate_padded([], [], self.pad_token_id)
        columns = self.pairs[batch]
        answers = zip(columns["chosen_ids"], columns["rejected_ids"], strict=True)
        sequences = [
            (prompt, answer)
            for prompt, both in zip(columns["prompt_ids"], answers, strict=True)
            for answer in both
        ]
        ref_logps = self.ref_logps[batch].reshape(-1).tolist()
        return collate_padded(sequences, ref_logps, self.pad_token_id)


class StepLoader(DataLoader[StepBatch]):
    """Passes the Trainer's epoch on to the plan, which plain DataLoaders don't."""

    def set_epoch(self, epoch: int) -> None:
        sampler = self.batch_sampler
        assert isinstance(sampler, StepSampler)
        sampler.set_epoch(epoch)


def whole_step(step: Any) -> Any:
    """The collate function: a step arrives laid out."""
    return step
