"""Data loaders of the trainer: one item is one optimizer step of this rank."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.utils.data import Dataset

from dpofast.columns import ID_COLUMNS
from dpofast.data.packing.batch import PackedPairs, StepBatch
from dpofast.data.packing.collate import Layout
from dpofast.data.packing.plan import MicroBatch, PlannedStep, TokenLimit


class StepDataset(Dataset[StepBatch]):
    """Tokenised pairs with their reference log-probs, indexed by planned steps.

    Args:
        pairs: datasets.Dataset with int lists prompt_ids, chosen_ids, rejected_ids.
        ref_logps: [n, 2] fp64, chosen and rejected of each pair, in nats.
        layout: of the micro-batches.
    """

    def __init__(self, pairs: Any, ref_logps: np.ndarray, layout: Layout) -> None:
        self.pairs = pairs.select_columns(list(ID_COLUMNS))
        self.ref_logps, self.layout = ref_logps, layout

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> StepBatch:
        return self.__getitems__(PlannedStep(([index],), 1))

    def __getitems__(self, step: PlannedStep) -> StepBatch:
        """Lay out one step; PyTorch's fetcher calls this with what the batch sampler yields."""
        return StepBatch([self._lay_out(batch) for batch in step.micro_batches], step.num_pairs)

    def _lay_out(self, batch: MicroBatch) -> PackedPairs:
        columns = self.pairs[batch]
        answers = zip(columns["chosen_ids"], columns["rejected_ids"], strict=True)
        sequences = [
            (prompt, answer)
            for prompt, both in zip(columns["prompt_ids"], answers, strict=True)
            for answer in both
        ]
        return self.layout.collate(sequences, self.ref_logps[batch].reshape(-1).tolist())


def token_limit(pairs: Any, layout: Layout, max_tokens: int) -> TokenLimit | None:
    """What the plan needs to know of a tokenised dataset's lengths; None for padded rows."""
    if not layout.is_packed:
        return None
    lengths: list[int] = []
    num_tokens = 0
    for batch in pairs.select_columns(list(ID_COLUMNS)).iter(batch_size=1000):
        for prompt, *answers in zip(*(batch[name] for name in ID_COLUMNS), strict=True):
            lengths.append(layout.num_tokens([(prompt, answer) for answer in answers]))
            num_tokens += sum(len(prompt) + len(answer) for answer in answers)
    return TokenLimit(lengths, max_tokens, num_tokens)
