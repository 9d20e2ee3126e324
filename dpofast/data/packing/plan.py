"""Which pairs each rank runs in each micro-batch of each optimizer step.

Every rank computes the whole plan from the seed, so nothing is sent. The order is that of
transformers' Trainer, hence of TRL: with the same seed and batch size each optimizer step sees the
same pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Sampler

from dpofast.data.packing.pack import PackFigures, figures, pack_step

MicroBatch = list[int]  # indices of pairs
DESCRIBED_STEPS = 100  # enough to tell, and made in a moment


@dataclass(frozen=True)
class PlannedStep:
    """One rank's part of one optimizer step."""

    micro_batches: tuple[MicroBatch, ...]
    num_pairs: int  # of the global step


@dataclass(frozen=True)
class BatchShape:
    """How many pairs a step has, and how they are spread.

    Attributes:
        pairs: largest number of pairs in a micro-batch of one rank.
        micro_batches: largest number of micro-batches of one rank in a step.
        world_size: ranks that share a step.
    """

    pairs: int
    micro_batches: int
    world_size: int

    @property
    def pairs_per_step(self) -> int:
        return self.pairs * self.micro_batches * self.world_size


@dataclass(frozen=True)
class TokenLimit:
    """Packed micro-batches: as many pairs as their tokens allow.

    Attributes:
        lengths: tokens of each pair of the dataset in a packed row.
        max_tokens: of a row; a longer pair has one of its own.
        num_tokens: of all sequences, each for itself.
    """

    lengths: Sequence[int]
    max_tokens: int
    num_tokens: int

    @property
    def saved(self) -> float:
        """Share of all tokens that sharing leaves out."""
        return 1.0 - sum(self.lengths) / max(self.num_tokens, 1)


def split_step(pairs: list[int], shape: BatchShape) -> list[list[MicroBatch]]:
    """Spread one step's pairs evenly: -> [micro-batch][rank], the same number on every rank.

    A step with fewer pairs than ranks leaves some ranks an empty micro-batch, which still has to
    be run, because the collectives of the others wait for it.
    """
    num_slots = max(1, math.ceil(len(pairs) / (shape.pairs * shape.world_size)))
    num_bins = num_slots * shape.world_size
    size, larger = divmod(len(pairs), num_bins)
    bins, start = [], 0
    for index in range(num_bins):
        end = start + size + (index < larger)
        bins.append(pairs[start:end])
        start = end
    return [bins[slot * shape.world_size :][: shape.world_size] for slot in range(num_slots)]


class StepSampler(Sampler[Any]):
    """Yields one rank's steps of the epoch set by `set_epoch`; as a DataLoader's batch sampler.

    Args:
        num_pairs: pairs of the dataset.
        shape: size of a step.
        rank: of this process, 0 to world_size - 1.
        seed: of the order; None keeps the dataset's own.
        drop_last: leave out a last step that isn't full.
        limit: packs a step's pairs by their tokens; `shape` then says how many pairs a step has.
    """

    def __init__(
        self,
        num_pairs: int,
        shape: BatchShape,
        rank: int,
        seed: int | None,
        drop_last: bool = False,
        limit: TokenLimit | None = None,
    ) -> None:
        self.limit = limit
        self.num_pairs, self.shape, self.rank = num_pairs, shape, rank
        self.seed, self.drop_last, self.epoch = seed, drop_last, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(self.num_pairs, self.shape.pairs_per_step)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[PlannedStep]:
        order = self._order()
        for index in range(len(self)):
            yield self._planned(order, index)

    def step(self, index: int) -> PlannedStep:
        """What iterating yields at this place of the epoch."""
        return self._planned(self._order(), index)

    def figures(self) -> PackFigures | None:
        """How well the epoch's first steps are packed; None where nothing is."""
        if self.limit is None or not len(self):
            return None
        size, lengths = self.shape.pairs_per_step, self.limit.lengths
        order = self._order()[: DESCRIBED_STEPS * size]
        steps = [order[start : start + size] for start in range(0, len(order), size)]
        tokens = [[lengths[pair] for pair in step] for step in steps]
        packed = [pack_step(step, self.shape.world_size, self.limit.max_tokens) for step in tokens]
        return figures(zip(tokens, packed, strict=True), self.limit.max_tokens)

    def describe(self, found: PackFigures) -> str:
        """Those figures in words."""
        assert self.limit is not None
        longer = f"; {found.over_cap} pairs are longer" if found.over_cap else ""
        return (
            f"{found.micro_batches} rows in {found.steps} steps, filled to {found.fill:.0%} of "
            f"{self.limit.max_tokens} tokens{longer}; the fullest of a step has "
            f"{found.imbalance_mean:.3f} times the mean; {self.limit.saved:.1%} fewer tokens than "
            "one sequence at a time"
        )

    def _planned(self, order: list[int], index: int) -> PlannedStep:
        start = index * self.shape.pairs_per_step
        pairs = order[start : start + self.shape.pairs_per_step]
        slots = self._slots(pairs)
        return PlannedStep(tuple(slot[self.rank] for slot in slots), len(pairs))

    def _slots(self, pairs: list[int]) -> list[list[MicroBatch]]:
        if self.limit is None:
            return split_step(pairs, self.shape)
        tokens = [self.limit.lengths[pair] for pair in pairs]
        packed = pack_step(tokens, self.shape.world_size, self.limit.max_tokens)
        return [[[pairs[place] for place in row] for row in slot] for slot in packed]

    def _order(self) -> list[int]:
        if self.seed is None:
            return list(range(self.num_pairs))
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return torch.randperm(self.num_pairs, generator=generator).tolist()
