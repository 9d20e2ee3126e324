from __future__ import annotations

import pytest
import torch

from dpofast.data.plan import BatchShape, StepSampler, split_step


@pytest.mark.parametrize("num_pairs", [1, 2, 3, 7, 8, 9, 16])
@pytest.mark.parametrize("shape", [BatchShape(4, 1, 1), BatchShape(2, 2, 2), BatchShape(3, 1, 4)])
def test_split_step_keeps_every_pair_once_under_the_micro_batch_size(num_pairs, shape):
    pairs = list(range(100, 100 + num_pairs))
    slots = split_step(pairs, shape)
    assert sorted(pair for slot in slots for batch in slot for pair in batch) == pairs
    assert all(len(slot) == shape.world_size for slot in slots)
    assert all(len(batch) <= shape.pairs for slot in slots for batch in slot)


def test_an_empty_step_still_has_a_micro_batch_on_every_rank():
    assert split_step([], BatchShape(2, 1, 3)) == [[[], [], []]]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_world_size_sees_the_same_pairs_in_each_step(world_size):
    shape = BatchShape(8 // (2 * world_size), 2, world_size)
    ranks = [StepSampler(21, shape, rank, seed=5) for rank in range(world_size)]
    order = torch.randperm(21, generator=torch.Generator().manual_seed(5 + 3)).tolist()
    for rank in ranks:
        rank.set_epoch(3)
    steps = list(zip(*ranks, strict=True))
    assert len(steps) == len(ranks[0]) == 3
    for index, parts in enumerate(steps):
        got = sorted(pair for part in parts for batch in part.micro_batches for pair in batch)
        expected = order[8 * index : 8 * index + 8]
        assert got == sorted(expected)
        assert all(part.num_pairs == len(expected) for part in parts)
        assert len({len(part.micro_batches) for part in parts}) == 1


def test_drop_last_leaves_the_partial_step_out():
    shape = BatchShape(4, 1, 1)
    assert len(list(StepSampler(10, shape, 0, seed=0, drop_last=True))) == 2
    assert len(list(StepSampler(10, shape, 0, seed=0))) == 3


def test_without_a_seed_the_order_is_the_datasets():
    steps = list(StepSampler(5, BatchShape(2, 1, 1), 0, seed=None))
    assert [list(step.micro_batches) for step in steps] == [[[0, 1]], [[2, 3]], [[4]]]
