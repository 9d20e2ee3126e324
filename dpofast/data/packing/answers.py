"""Micro-batches of single answers, for losses that take each answer by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dpofast.columns import LABEL_COLUMN, MISMATCHED_COLUMN, UNPAIRED
from dpofast.data.packing.batch import PackedPairs, StepBatch
from dpofast.data.packing.collate import Layout
from dpofast.data.packing.packed_row import runs_of_prompts
from dpofast.data.packing.pair_columns import PairColumns
from dpofast.data.packing.plan import MicroBatch, PlannedStep
from dpofast.data.packing.token_limit import TokenLimit

PROMPT, ANSWER = UNPAIRED.id_columns


@dataclass(frozen=True, kw_only=True)
class PackedAnswers(PackedPairs):
    """One micro-batch of S single answers; in a packed row, neighbours may share their prompt.

    Wherever pairs are counted, answers are: `num_pairs` is S, and `weights` are [S].

    Attributes:
        is_desirable: [S] bool.
        mismatched: the prompts with answers to other prompts, as sequences of their own; None if
            the loss needs none.
        z: [] fp64, what the loss compares log-ratios with; None until the step has estimated it.
    """

    is_desirable: Tensor
    mismatched: PackedPairs | None = None
    z: Tensor | None = None

    @classmethod
    def of(
        cls, laid_out: PackedPairs, labels: Sequence[bool], mismatched: PackedPairs | None
    ) -> PackedAnswers:
        """The answers of a row that is laid out, with their labels."""
        values = {field.name: getattr(laid_out, field.name) for field in fields(PackedPairs)}
        is_desirable = torch.tensor(labels, dtype=torch.bool)
        return cls(**values, is_desirable=is_desirable, mismatched=mismatched)

    @property
    def num_pairs(self) -> int:
        return len(self.bounds) - 1

    @property
    def lengths(self) -> Tensor:
        """[S] int64 on the CPU, scored tokens of each answer."""
        return self.bounds.diff()

    def to(self, device: torch.device | str) -> PackedPairs:
        return self._with_mismatched(super().to(device), lambda batch: batch.to(device))

    def pin_memory(self) -> PackedPairs:
        return self._with_mismatched(super().pin_memory(), PackedPairs.pin_memory)

    def _with_mismatched(
        self, moved: PackedPairs, move: Callable[[PackedPairs], PackedPairs]
    ) -> PackedPairs:
        if self.mismatched is None:
            return moved
        return replace(moved, mismatched=move(self.mismatched))  # type: ignore[call-arg]


class AnswerSteps(Dataset[StepBatch]):
    """Lays out the micro-batches of planned steps of unpaired rows.

    Args:
        rows: datasets.Dataset with int lists prompt_ids and completion_ids, bool label, and int
            lists mismatched_ids if the loss needs them.
        ref_logps: [n, 2] fp64, summed log-probs of the answer and of the mismatched one, in nats.
        layout: layout of the micro-batches.
    """

    def __init__(self, rows: Any, ref_logps: np.ndarray, layout: Layout) -> None:
        self._weights = PairColumns.of(rows).weights
        wanted = (PROMPT, ANSWER, LABEL_COLUMN, MISMATCHED_COLUMN)
        self.pairs = rows.select_columns([name for name in wanted if name in rows.column_names])
        self.ref_logps, self.layout = ref_logps, layout

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> StepBatch:
        return self.__getitems__(PlannedStep(([index],), 1))

    def __getitems__(self, step: PlannedStep) -> StepBatch:
        """Lay out one step; PyTorch's fetcher passes what the batch sampler yields."""
        laid_out: list[PackedPairs] = [self._lay_out(batch) for batch in step.micro_batches]
        return StepBatch(laid_out, step.num_pairs, step.micro_batches)

    def _lay_out(self, batch: MicroBatch) -> PackedAnswers:
        rows, ref_logps = self.pairs[batch], self.ref_logps[batch].reshape(-1, 2)

        def collated(answers: str, side: int) -> PackedPairs:
            sequences = list(zip(rows[PROMPT], rows[answers], strict=True))
            runs = runs_of_prompts(sequences)
            return self.layout.collate(sequences, ref_logps[:, side].tolist(), runs)

        has_mismatched = MISMATCHED_COLUMN in self.pairs.column_names
        mismatched = collated(MISMATCHED_COLUMN, 1) if has_mismatched else None
        laid_out = PackedAnswers.of(collated(ANSWER, 0), rows[LABEL_COLUMN], mismatched)
        if self._weights is None:
            return laid_out
        return replace(laid_out, weights=torch.from_numpy(self._weights[batch]))


def answer_token_limit(rows: Any, layout: Layout, max_tokens: int) -> TokenLimit | None:
    """Count the tokens of each unpaired row, which the plan of packed rows needs.

    A row counts the tokens of its longer sequence, that of its own answer or of the mismatched one,
    because the two are in rows of their own. A prompt that neighbours share is counted for each.

    Args:
        rows: as in AnswerSteps.
        layout: layout of the micro-batches.
        max_tokens: most tokens in a packed row.
    Returns:
        The limit, or None if the layout is padded.
    """
    if not layout.is_packed:
        return None
    names = [ANSWER, *([MISMATCHED_COLUMN] if MISMATCHED_COLUMN in rows.column_names else [])]
    table = rows.select_columns([PROMPT, *names]).with_format("arrow")[:]
    prompts, *answers = (pc.list_value_length(table[name]).to_numpy() for name in (PROMPT, *names))
    lengths = (prompts + np.max(answers, axis=0)).tolist()
    return TokenLimit(lengths, max_tokens, lengths)
