"""Optimizer steps that keep all pairs of a prompt together (the option group_by_prompt).

A step takes whole groups, the pairs of one prompt, until it has enough pairs. If each epoch were
cut by itself, one could have more steps than another, because the groups differ in size. But the
schedule, the epoch in the logs and the place at which a run resumes are all computed from one
number of steps. So the groups are shuffled and cut once, by the seed alone. This gives the pattern:
how many pairs each group of each step has. An epoch shuffles the steps of the pattern, and fills
them with groups of these sizes.

If no prompt has two pairs, the steps are those of plain DPO.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from dpofast.counted import counted
from dpofast.data.packing.likelihood import ChosenTokens
from dpofast.data.packing.plan import BatchShape, StepSampler
from dpofast.data.packing.token_limit import TokenLimit


@dataclass(frozen=True)
class OrderFigures:
    """The sizes of an epoch's steps.

    Attributes:
        prompts: number of prompts.
        largest_group: most pairs of a prompt.
        steps: number of optimizer steps in an epoch.
        smallest_step, largest_step: pairs in full steps, of which there is at least one; or in the
            only step.
        last_step: pairs of a last step that isn't full, trained or not; 0 if there is none.
    """

    prompts: int
    largest_group: int
    steps: int
    smallest_step: int
    largest_step: int
    last_step: int


class PromptOrder:
    """The steps of each epoch, as lists of pairs. Pairs of a prompt are neighbours in their step.

    A step has at least `pairs_per_step` pairs, and fewer than that plus the largest group's. Only
    the last step of an epoch can have fewer. All epochs have the same number of steps.

    Args:
        prompts: [n] int64, number of each pair's prompt.
        pairs_per_step: fewest pairs in a full step.
        seed: seed of the order; None keeps the order in which prompts first appear.

    Attributes:
        sizes: [G] int64, pairs of each group, in the order of first appearance.
        step_sizes: [S] int64, pairs of each step of the pattern.
        last_step: pairs of the last step if it isn't full; otherwise 0.
    """

    def __init__(self, prompts: np.ndarray, pairs_per_step: int, seed: int | None) -> None:
        self.num_pairs, self.pairs_per_step, self.seed = len(prompts), pairs_per_step, seed
        _, first, group, sizes = np.unique(
            prompts, return_index=True, return_inverse=True, return_counts=True
        )
        by_appearance = np.argsort(first)
        self.sizes = sizes[by_appearance]
        # The pairs, group by group.
        self._pairs = np.argsort(np.argsort(by_appearance)[group], kind="stable")  # [n]
        self._starts = np.cumsum(self.sizes) - self.sizes  # [G]
        # The pattern: the size of each place for a group, and the first place of each step.
        self._places = self._shuffled_places()  # [G]
        bounds = _cut(self._places, pairs_per_step)  # [S + 1]
        self._first_places, self._num_places = bounds[:-1], np.diff(bounds)  # [S]
        self.step_sizes = np.add.reduceat(self._places, bounds[:-1])
        last = int(self.step_sizes[-1])
        self.last_step = last if last < pairs_per_step else 0

    def __len__(self) -> int:
        return len(self.step_sizes)

    def steps(self, epoch: int) -> list[list[int]]:
        """The pairs of each step of an epoch, counted from 0."""
        order, groups = np.arange(len(self)), np.arange(len(self.sizes))
        if self.seed is not None:
            # The permutation of plain DPO, if no prompt has two pairs.
            generator = torch.Generator().manual_seed(self.seed + epoch)
            groups = torch.randperm(len(groups), generator=generator).numpy()
            num_full = len(self) - bool(self.last_step)
            order[:num_full] = torch.randperm(num_full, generator=generator).numpy()
        places = self._places[_ranges(self._first_places[order], self._num_places[order])]  # [G]
        filled = np.empty_like(groups)
        # Sorted by size, places and groups match; a stable sort keeps both orders within a size.
        by_size = np.argsort(self.sizes[groups], kind="stable")
        filled[np.argsort(places, kind="stable")] = groups[by_size]
        pairs = self._pairs[_ranges(self._starts[filled], self.sizes[filled])].tolist()
        ends = np.cumsum(self.step_sizes[order]).tolist()
        return [pairs[start:end] for start, end in pairwise([0, *ends])]

    def _shuffled_places(self) -> np.ndarray:
        """The sizes in the order in which they are cut into steps: [G].

        The end has places of the commonest size only, enough for a last step that isn't full. So
        its groups differ from epoch to epoch, and dataloader_drop_last doesn't always leave out the
        same ones.
        """
        if self.seed is None:
            return self.sizes
        generator = torch.Generator().manual_seed(self.seed)
        places = self.sizes[torch.randperm(len(self.sizes), generator=generator).numpy()]
        values, counts = np.unique(places, return_counts=True)
        commonest = int(values[counts.argmax()])
        enough = math.ceil(self.pairs_per_step / commonest)
        moved = np.flatnonzero(places == commonest)[-enough:]
        return np.concatenate([np.delete(places, moved), places[moved]])


class GroupedSampler(StepSampler):
    """A StepSampler whose steps keep all pairs of a prompt together.

    Args:
        order: the steps of each epoch.
        shape: the number of pairs from which on a step is full.
        rank, drop_last, limit, tokens: as for StepSampler.
    """

    def __init__(
        self,
        order: PromptOrder,
        shape: BatchShape,
        rank: int,
        drop_last: bool = False,
        limit: TokenLimit | None = None,
        tokens: ChosenTokens | None = None,
    ) -> None:
        super().__init__(order.num_pairs, shape, rank, order.seed, drop_last, limit, tokens)
        self.order = order

    def __len__(self) -> int:
        return len(self.order) - (self.drop_last and self.order.last_step > 0)

    def mean_pairs(self) -> float:
        """The mean number of pairs in a step of an epoch that has steps."""
        return float(self.order.step_sizes[: len(self)].mean())

    def order_figures(self) -> OrderFigures:
        """The sizes of an epoch's steps."""
        order = self.order
        full = order.step_sizes[order.step_sizes >= self.shape.pairs_per_step]
        full = full if len(full) else order.step_sizes
        return OrderFigures(
            prompts=len(order.sizes),
            largest_group=int(order.sizes.max()),
            steps=len(self),
            smallest_step=int(full.min()),
            largest_step=int(full.max()),
            last_step=order.last_step,
        )

    def describe_order(self) -> str:
        """A sentence for the log about the sizes of groups and steps."""
        found = self.order_figures()
        smallest = found.smallest_step
        sizes = f"{smallest:,} to " if smallest < found.largest_step else ""
        last = ""
        if found.last_step:
            fate = "is left out (dataloader_drop_last)" if self.drop_last else "is smaller"
            last = f"; the last of an epoch, with {counted(found.last_step, 'pair')}, {fate}"
        return (
            f"{counted(self.num_pairs, 'pair')} of {counted(found.prompts, 'prompt')}, at most "
            f"{found.largest_group:,} of one, in {counted(found.steps, 'step')} of {sizes}"
            f"{counted(found.largest_step, 'pair')}{last}"
        )

    def _steps(self) -> list[list[int]]:
        return self.order.steps(self.epoch)[: len(self)]


def _cut(places: np.ndarray, pairs_per_step: int) -> np.ndarray:
    """Cut groups of these sizes into steps, each as soon as it has enough pairs.

    Returns:
        [S + 1] int64: the first group of each step, and the number of groups.
    """
    ends = np.cumsum(places)
    # For each group, the one after the step that would begin with it.
    nexts = np.searchsorted(ends, ends - places + pairs_per_step) + 1
    nexts = np.minimum(nexts, len(places)).tolist()
    bounds = [0]
    while bounds[-1] < len(places):
        bounds.append(nexts[bounds[-1]])
    return np.asarray(bounds)


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Consecutive numbers from each start on: starts [5, 0], lengths [2, 3] give 5 6 0 1 2."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - ends + lengths, lengths) + np.arange(lengths.sum())
