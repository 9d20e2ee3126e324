"""Decides which pairs each rank runs in each micro-batch of each optimizer step.

Every rank computes the whole plan from the seed, so nothing is communicated. The order of the pairs
is that of transformers' Trainer, and so of TRL: with the same seed and batch size, each optimizer
step sees the same pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from dpofast.counted import counted
from dpofast.data.packing.balance import pack_step
from dpofast.data.packing.figures import PlanFigures, plan_figures
from dpofast.data.packing.likelihood import ChosenTokens, PairsPerToken
from dpofast.data.packing.token_limit import TokenLimit

MicroBatch = list[int]  # indices of pairs in the dataset
# Steps that `figures` packs: enough for stable figures, and few enough to be quick.
DESCRIBED_STEPS = 100


@dataclass(frozen=True)
class PlannedStep:
    """The part of one optimizer step that one rank runs.

    Attributes:
        micro_batches: this rank's micro-batches; one can be empty.
        num_pairs: pairs in the step on all ranks.
        pairs_per_token: what a likelihood term needs to take its mean; None if nothing asks for it.
        parts: of each micro-batch, the lists of its pairs that it holds as one group, in its order;
            None where rows are padded.
    """

    micro_batches: tuple[MicroBatch, ...]
    num_pairs: int
    pairs_per_token: PairsPerToken | None = None
    parts: tuple[list[list[int]], ...] | None = None


@dataclass(frozen=True)
class BatchShape:
    """The number of pairs in a step, as the batch size options give it.

    Attributes:
        pairs: most pairs in a micro-batch.
        micro_batches: most micro-batches that one rank runs in a step of pairs_per_step pairs.
        world_size: number of ranks.
    """

    pairs: int
    micro_batches: int
    world_size: int

    @property
    def pairs_per_step(self) -> int:
        return self.pairs * self.micro_batches * self.world_size


def split_step(pairs: list[int], shape: BatchShape) -> list[list[MicroBatch]]:
    """Spread one step's pairs evenly over ranks and micro-batches, by their number.

    Returns:
        [micro-batch][rank] -> pairs, with the same number of micro-batches on every rank. If the
        step has fewer pairs than ranks, some micro-batches are empty. They still have to be run,
        because the collectives of the other ranks wait for them.
    """
    # The smallest number of micro-batches that lets each have at most shape.pairs.
    num_slots = max(1, math.ceil(len(pairs) / (shape.pairs * shape.world_size)))
    num_batches = num_slots * shape.world_size
    size, larger = divmod(len(pairs), num_batches)
    batches, start = [], 0
    for index in range(num_batches):
        end = start + size + (index < larger)  # the first batches take one pair more
        batches.append(pairs[start:end])
        start = end
    return [batches[slot * shape.world_size :][: shape.world_size] for slot in range(num_slots)]


class StepSampler(Sampler[Any]):
    """Batch sampler for a DataLoader: yields one rank's steps of the epoch set by `set_epoch`.

    Args:
        num_pairs: number of pairs in the dataset.
        shape: number of pairs in a step.
        rank: rank of this process, 0 to world_size - 1.
        seed: seed of the order; None keeps the order of the dataset.
        drop_last: leave out the last step if it isn't full.
        limit: spreads a step's pairs over rows by their tokens; None spreads them by their number.
        tokens: tokens of the pairs, if the loss has a likelihood term. Its mean is taken over the
            pairs of a step.
        over_all: take that mean over all pairs, as an evaluation does.
        prompts: [n] int64, number of each pair's prompt, if rows are padded and a micro-batch runs
            each answer once. Pairs of a prompt are then neighbours when a step is spread by number.
    """

    def __init__(
        self,
        num_pairs: int,
        shape: BatchShape,
        rank: int,
        seed: int | None,
        drop_last: bool = False,
        limit: TokenLimit | None = None,
        tokens: ChosenTokens | None = None,
        over_all: bool = False,
        prompts: np.ndarray | None = None,
    ) -> None:
        self.limit, self.tokens, self.over_all = limit, tokens, over_all
        self.prompts = prompts
        self.num_pairs, self.shape, self.rank = num_pairs, shape, rank
        self.seed, self.drop_last, self.epoch = seed, drop_last, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(self.num_pairs, self.shape.pairs_per_step)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[PlannedStep]:
        for pairs in self._steps():
            yield self._planned(pairs)

    def step(self, index: int) -> PlannedStep:
        """One step of the epoch, counted from 0."""
        return self._planned(self._steps()[index])

    def figures(self) -> PlanFigures | None:
        """How well the epoch's first steps are packed; None without packed rows or steps."""
        if self.limit is None or not len(self):
            return None
        steps = self._steps()[:DESCRIBED_STEPS]
        return plan_figures(steps, self.limit, self.shape.world_size)

    def describe(self, found: PlanFigures) -> str:
        """A sentence for the log that states these figures."""
        assert self.limit is not None
        are = "is" if found.over_cap == 1 else "are"
        longer = f"; {counted(found.over_cap, 'pair')} {are} longer" if found.over_cap else ""
        return (
            f"{counted(found.micro_batches, 'row')} in {counted(found.steps, 'step')}, filled to "
            f"{found.fill:.0%} of {self.limit.max_tokens} tokens{longer}; the fullest of a step "
            f"has {found.imbalance_mean:.3f} times the mean; {_saved(found)}"
        )

    def _steps(self) -> list[list[int]]:
        """The pairs of each step of the epoch, on all ranks."""
        order, size = self._order(), self.shape.pairs_per_step
        return [order[start : start + size] for start in range(0, len(self) * size, size)]

    def _planned(self, pairs: list[int]) -> PlannedStep:
        per_token = None
        if self.tokens is not None:
            per_token = self.tokens.pairs_per_token(slice(None) if self.over_all else pairs)
        if self.limit is None:
            slots = split_step(self._by_prompt(pairs), self.shape)
            return PlannedStep(tuple(slot[self.rank] for slot in slots), len(pairs), per_token)
        found = self.limit.parts(pairs)
        tokens = [part.tokens for part in found]
        packed = pack_step(tokens, self.shape.world_size, self.limit.max_tokens)
        # pack_step counts parts within the step; micro-batches count pairs in the dataset.
        parts = tuple([found[index].pairs for index in slot[self.rank]] for slot in packed)
        own = tuple(list(chain.from_iterable(row)) for row in parts)
        return PlannedStep(own, len(pairs), per_token, parts)

    def _by_prompt(self, pairs: list[int]) -> list[int]:
        """The pairs with those of a prompt together, in the order of its first pair."""
        if self.prompts is None:
            return pairs
        of_prompt: dict[int, list[int]] = {}
        for pair, prompt in zip(pairs, self.prompts[pairs].tolist(), strict=True):
            of_prompt.setdefault(prompt, []).append(pair)
        return [pair for together in of_prompt.values() for pair in together]

    def _order(self) -> list[int]:
        if self.seed is None:
            return list(range(self.num_pairs))
        # transformers seeds its sampler the same way, so runs see the same pairs in each step.
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return torch.randperm(self.num_pairs, generator=generator).tolist()


def _saved(found: PlanFigures) -> str:
    """What sharing saves, in words."""
    if found.tokens == found.pair_tokens:
        return f"{found.saved:.1%} fewer tokens than one sequence at a time"
    runs, groups = ("runs", "its group was") if found.repeats == 1 else ("run", "their groups were")
    again = f" ({counted(found.repeats, 'answer')} {runs} again, as {groups} cut)"
    return (
        f"{found.plain_tokens:,} tokens one sequence at a time, {found.pair_tokens:,} one pair at "
        f"a time, {found.tokens:,} with each answer of a prompt once"
        f"{again if found.repeats else ''}: {found.saved:.1%} fewer tokens"
    )
