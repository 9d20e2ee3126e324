"""A dataset whose items are optimizer steps: the part of each that this rank runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from dpofast.columns import ID_COLUMNS
from dpofast.data.packing.batch import PackedPairs, PromptAnswer, StepBatch, TokenIds
from dpofast.data.packing.collate import Layout
from dpofast.data.packing.ld_weights import ld_weights
from dpofast.data.packing.likelihood import NO_LIKELIHOOD, ChosenTokens, Likelihood
from dpofast.data.packing.pair_columns import PairColumns
from dpofast.data.packing.plan import MicroBatch, PlannedStep, TokenLimit


class StepDataset(Dataset[StepBatch]):
    """Lays out the micro-batches of planned steps, with their reference log-probs.

    Args:
        pairs: datasets.Dataset with int lists prompt_ids, chosen_ids, rejected_ids.
        ref_logps: [n, 2] fp64, summed log-probs of chosen and rejected of each pair, in nats.
        layout: layout of the micro-batches.
        usual_confidence: label_confidence of pairs that have none, if others have one.
        likelihood: likelihood terms of the loss.
        ld_alpha: weight of the tokens by which an answer is longer than the other one, in
            `ref_logps` already; None for 1.
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
    ) -> None:
        self.likelihood = likelihood
        self._columns = PairColumns.of(pairs, usual_confidence)
        # Reading a pair decodes all its columns, so the columns that aren't needed are dropped.
        self.pairs = pairs.select_columns(list(ID_COLUMNS))
        self.ref_logps, self.layout, self.ld_alpha = ref_logps, layout, ld_alpha

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> StepBatch:
        per_token = None
        if self.likelihood:
            per_token = ChosenTokens.of(self.pairs.select([index])).pairs_per_token(slice(None))
        return self.__getitems__(PlannedStep(([index],), 1, per_token))

    def __getitems__(self, step: PlannedStep) -> StepBatch:
        """Lay out one step; PyTorch's fetcher passes what the batch sampler yields."""
        laid_out = [self._lay_out(batch, step) for batch in step.micro_batches]
        return StepBatch(laid_out, step.num_pairs, step.micro_batches)

    def _lay_out(self, batch: MicroBatch, step: PlannedStep) -> PackedPairs:
        sequences = [sequence for pair in _pairs_of(self.pairs[batch]) for sequence in pair]
        laid_out = self.layout.collate(
            sequences,
            self.ref_logps[batch].reshape(-1).tolist(),
            scores_prompts=self.likelihood.scores_prompts,
        )
        laid_out = replace(laid_out, **self._columns.of_batch(batch))
        if self.ld_alpha is not None:
            weights = torch.from_numpy(ld_weights(laid_out.lengths.numpy(), self.ld_alpha))
            laid_out = replace(laid_out, token_weights=weights)
        if not self.likelihood:
            return laid_out
        assert step.pairs_per_token is not None, "the plan counts tokens"
        return laid_out.with_likelihood(*step.pairs_per_token.coefficients(self.likelihood))


def token_limit(pairs: Any, layout: Layout, max_tokens: int) -> TokenLimit | None:
    """Count the tokens of each tokenised pair, which the plan of packed rows needs.

    Args:
        pairs: datasets.Dataset with int lists prompt_ids, chosen_ids, rejected_ids.
        layout: layout of the micro-batches.
        max_tokens: most tokens in a packed row.
    Returns:
        The limit, or None if the layout is padded: then a plan counts pairs, not tokens.
    """
    if not layout.is_packed:
        return None
    lengths: list[int] = []
    num_tokens = 0
    for columns in pairs.select_columns(list(ID_COLUMNS)).iter(batch_size=1000):
        for pair in _pairs_of(columns):
            lengths.append(layout.num_tokens(pair))
            num_tokens += sum(len(prompt) + len(answer) for prompt, answer in pair)
    return TokenLimit(lengths, max_tokens, num_tokens)


def _pairs_of(columns: dict[str, list[TokenIds]]) -> list[tuple[PromptAnswer, PromptAnswer]]:
    """The chosen and the rejected sequence of each pair in a slice of the dataset."""
    parts = zip(*(columns[name] for name in ID_COLUMNS), strict=True)
    return [((prompt, chosen), (prompt, rejected)) for prompt, chosen, rejected in parts]
