"""A dataset whose items are optimizer steps: the part of each that this rank runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from dpofast.columns import ID_COLUMNS
from dpofast.data.packing.batch import PackedPairs, PromptAnswer, StepBatch
from dpofast.data.packing.collate import Layout
from dpofast.data.packing.distinct import DistinctSequences
from dpofast.data.packing.ld_weights import ld_weights
from dpofast.data.packing.likelihood import NO_LIKELIHOOD, ChosenTokens, Likelihood
from dpofast.data.packing.pair_columns import PairColumns
from dpofast.data.packing.plan import MicroBatch, PlannedStep
from dpofast.data.packing.prompt_groups import PromptGroups


class StepDataset(Dataset[StepBatch]):
    """Lays out the micro-batches of planned steps, with their reference log-probs.

    Pairs of a micro-batch that have the same prompt form groups, in which each answer runs once.
    So the pairs can change their order within the micro-batch.

    Args:
        pairs: datasets.Dataset with int lists prompt_ids, chosen_ids, rejected_ids.
        ref_logps: [n, 2] fp64, summed log-probs of chosen and rejected of each pair, in nats.
        layout: layout of the micro-batches.
        usual_confidence: label_confidence of pairs that have none, if others have one.
        likelihood: likelihood terms of the loss.
        ld_alpha: weight of the tokens by which an answer is longer than the other one, in
            `ref_logps` already; None for 1.
        groups: prompts and answers of the pairs; found here if the layout needs them.
    """

    def __init__(
        self,
        pairs: Any,
        ref_logps: np.ndarray,
        layout: Layout,
        usual_confidence: float = 1.0,
        likelihood: Likelihood = NO_LIKELIHOOD,
        *,
        ld_alpha: float | None = None,
        groups: PromptGroups | None = None,
    ) -> None:
        self.likelihood = likelihood
        self._columns = PairColumns.of(pairs, usual_confidence)
        # Reading a pair decodes all its columns, so the columns that aren't needed are dropped.
        self.pairs = pairs.select_columns(list(ID_COLUMNS))
        self.ref_logps, self.layout, self.ld_alpha = ref_logps, layout, ld_alpha
        if groups is None and layout.runs_answers_once:
            groups = PromptGroups.of(pairs)
        self._groups = groups if layout.runs_answers_once else None

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> StepBatch:
        per_token = None
        if self.likelihood:
            per_token = ChosenTokens.of(self.pairs.select([index])).pairs_per_token(slice(None))
        return self.__getitems__(PlannedStep(([index],), 1, per_token))

    def __getitems__(self, step: PlannedStep) -> StepBatch:
        """Lay out one step; PyTorch's fetcher passes what the batch sampler yields."""
        parts = step.parts or [self._parts_of(batch) for batch in step.micro_batches]
        distinct = [DistinctSequences.of(of_batch, self._groups) for of_batch in parts]
        laid_out = [self._lay_out(each, step) for each in distinct]
        return StepBatch(laid_out, step.num_pairs, tuple(each.pairs for each in distinct))

    def _parts_of(self, batch: MicroBatch) -> list[list[int]]:
        """The groups of a micro-batch whose plan doesn't say them.

        In padded rows, which share no prefix, a group has all pairs of a prompt.
        """
        if self._groups is None:
            return [[pair] for pair in batch]
        return self._groups.uncut(batch)

    def _lay_out(self, distinct: DistinctSequences, step: PlannedStep) -> PackedPairs:
        batch = distinct.pairs
        laid_out = self._sequences_of(distinct)
        ref_logps = torch.from_numpy(self.ref_logps[batch]).flatten()  # [2P]
        laid_out = replace(laid_out, ref_logps=ref_logps, **self._columns.of_batch(batch))
        # A pair's own reference log-prob of an answer counts, should another pair have another one.
        agree = torch.equal(laid_out.of_pairs(laid_out.ref_of_sequences()), ref_logps)
        if self.ld_alpha is not None or not agree:
            laid_out = laid_out.of_each_slot()
        if self.ld_alpha is not None:
            weights = torch.from_numpy(ld_weights(laid_out.lengths.numpy(), self.ld_alpha))
            laid_out = replace(laid_out, token_weights=weights)
        if not self.likelihood:
            return laid_out
        assert step.pairs_per_token is not None, "the plan counts tokens"
        return laid_out.with_likelihood(*step.pairs_per_token.coefficients(self.likelihood))

    def _sequences_of(self, distinct: DistinctSequences) -> PackedPairs:
        """The sequences, laid out, and the pairs that they make."""
        slots = _slots_of(self.pairs[distinct.pairs])
        laid_out = self.layout.collate(
            [slots[slot] for slot in distinct.slots],
            group_sizes=distinct.group_sizes,
            counts=distinct.counts,
            scored_prompts=distinct.first_of_groups if self.likelihood.scores_prompts else (),
        )
        if laid_out.prompts is not None:
            laid_out = replace(laid_out, prompts=laid_out.prompts[torch.tensor(distinct.groups)])
        if laid_out.prompts is None and distinct.is_plain:
            return laid_out
        return replace(laid_out, pairs=torch.tensor(distinct.sequences).view(-1, 2))


def _slots_of(columns: dict[str, Any]) -> list[PromptAnswer]:
    """The sequences chosen_0, rejected_0, chosen_1, ... of a slice of the dataset."""
    prompts, *answers = (columns[name] for name in ID_COLUMNS)
    return [
        (prompt, answer) for prompt, *both in zip(prompts, *answers, strict=True) for answer in both
    ]
