"""Steps that keep the pairs of a prompt together, compared with their rules and plain loops."""

from __future__ import annotations

import random
import time
from collections import Counter

import numpy as np
import pytest

from dpofast.data.packing.plan import BatchShape, StepSampler
from dpofast.data.packing.prompt_order import GroupedSampler, PromptOrder
from dpofast.data.packing.token_limit import TokenLimit

EPOCHS = range(4)


def random_prompts(seed):
    """The prompts of some pairs, pairs per step, and a seed."""
    rng = random.Random(seed)
    largest = rng.choice([1, 2, 6, 21])
    prompts = [
        prompt for prompt in range(rng.randint(1, 40)) for _ in range(rng.randint(1, largest))
    ]
    rng.shuffle(prompts)
    return np.array(prompts), rng.choice([1, 2, 4, 7, 24, 200]), rng.randrange(100)


def greedy(sizes, pairs_per_step):
    """Steps of groups of these sizes, in a plain loop."""
    steps = [[]]
    for size in sizes:
        if sum(steps[-1]) >= pairs_per_step:
            steps.append([])
        steps[-1].append(size)
    return steps


def groups_of(step, prompts):
    """The sizes of a step's groups in their order, which fails if a group isn't together."""
    found = []
    for pair in step:
        if not found or found[-1][0] != prompts[pair]:
            found.append((prompts[pair], []))
        found[-1][1].append(pair)
    assert len({prompt for prompt, _ in found}) == len(found)
    assert all(pairs == sorted(pairs) for _, pairs in found)
    return [len(pairs) for _, pairs in found]


@pytest.mark.parametrize("case", range(40))
def test_the_rules_hold_in_every_epoch(case):
    prompts, wanted, seed = random_prompts(case)
    order, largest = PromptOrder(prompts, wanted, seed), max(Counter(prompts.tolist()).values())
    shapes = []
    for epoch in EPOCHS:
        steps = order.steps(epoch)
        assert len(steps) == len(order)
        assert sorted(pair for step in steps for pair in step) == list(range(len(prompts)))
        places = [{prompts[pair] for pair in step} for step in steps]
        assert sum(map(len, places)) == len(set(prompts.tolist())), "a prompt is in two steps"
        assert all(wanted <= len(step) < wanted + largest for step in steps[:-1])
        assert len(steps[-1]) < wanted + largest
        assert (len(steps[-1]) if len(steps[-1]) < wanted else 0) == order.last_step
        shapes.append(Counter(tuple(groups_of(step, prompts)) for step in steps))
        assert steps == PromptOrder(prompts, wanted, seed).steps(epoch)
    assert all(shape == shapes[0] for shape in shapes), "each epoch has the steps of the pattern"
    sizes = [size for step in np.split(order._places, order._first_places[1:]) for size in step]
    assert Counter(map(tuple, greedy(sizes, wanted))) == shapes[0]


@pytest.mark.parametrize("case", range(40))
def test_without_a_seed_prompts_come_in_the_order_of_their_first_pair(case):
    prompts, wanted, _ = random_prompts(case)
    seen = dict.fromkeys(prompts.tolist())
    steps = [[]]
    for prompt in seen:
        if len(steps[-1]) >= wanted:
            steps.append([])
        steps[-1] += [pair for pair in range(len(prompts)) if prompts[pair] == prompt]
    order = PromptOrder(prompts, wanted, None)
    assert order.steps(0) == order.steps(3) == steps


def test_an_example_by_hand():
    assert PromptOrder(np.array([7, 5, 7, 5, 9, 5]), 2, None).steps(0) == [[0, 2], [1, 3, 5], [4]]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("times", [1, 3])
def test_groups_of_one_size_come_in_the_order_of_plain_dpo(times, drop_last):
    """With one pair a prompt, the steps are plain DPO's; with three, so are the prompts'."""
    shape = BatchShape(4, 1, 1)
    plain = StepSampler(22, shape, 0, seed=5, drop_last=drop_last)
    prompts = np.repeat(np.arange(22), times)
    order = PromptOrder(prompts, 4 * times, 5)
    grouped = GroupedSampler(order, BatchShape(4 * times, 1, 1), 0, drop_last)
    for epoch in EPOCHS:
        plain.set_epoch(epoch)
        grouped.set_epoch(epoch)
        expected = [step.micro_batches[0] for step in plain]
        found = [prompts[step.micro_batches[0]][::times].tolist() for step in grouped]
        assert found == expected
        assert len(grouped) == len(plain) == 6 - drop_last


def test_epochs_differ_in_the_company_of_a_prompt_and_in_the_place_of_the_largest():
    prompts = np.repeat(np.arange(40), [9] + [2] * 20 + [1] * 19)
    order = PromptOrder(prompts, 8, 0)
    epochs = [order.steps(epoch) for epoch in range(30)]
    largest = [next(i for i, step in enumerate(steps) if 0 in step) for steps in epochs]
    assert set(largest) == set(range(len(order) - bool(order.last_step)))
    partners = [
        {prompts[pair] for step in steps if 9 in step for pair in step} - {1} for steps in epochs
    ]
    assert len(set.union(*partners)) > 20
    assert len(set(map(str, epochs))) == 30


def test_another_seed_gives_another_pattern():
    prompts = np.repeat(np.arange(30), np.arange(30) % 5 + 1)
    found = {str(PromptOrder(prompts, 8, seed).step_sizes) for seed in range(10)}
    assert len(found) > 5


def test_a_smaller_last_step_has_other_prompts_in_each_epoch():
    """A prompt that no other equals in size would be left out in every epoch, if it were in one."""
    prompts = np.repeat(np.arange(110), [13, 11, 7, 5, 4, *[3] * 5, *[1] * 100])
    orders = [order for seed in range(10) if (order := PromptOrder(prompts, 24, seed)).last_step]
    assert len(orders) > 5
    for order in orders:
        lasts = [set(order.steps(epoch)[-1]) for epoch in range(12)]
        assert not set.intersection(*lasts)
        assert {1} == {Counter(prompts)[prompts[pair]] for last in lasts for pair in last}
        trained = GroupedSampler(order, BatchShape(24, 1, 1), 0, drop_last=True)
        seen = {pair for epoch in range(12) for pair in steps_of(trained, epoch)}
        assert len(seen) == len(prompts)


def steps_of(sampler, epoch):
    sampler.set_epoch(epoch)
    return [pair for step in sampler for batch in step.micro_batches for pair in batch]


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("case", range(6))
def test_ranks_share_the_steps_of_the_order(case, world_size, is_packed):
    prompts, _, seed = random_prompts(case)
    shape = BatchShape(2, 2, world_size)
    order = PromptOrder(prompts, shape.pairs_per_step, seed)
    lengths = [5 + 7 * index % 31 for index in range(len(prompts))]
    limit = TokenLimit(lengths, 40, [2 * length for length in lengths]) if is_packed else None
    ranks = [GroupedSampler(order, shape, rank, limit=limit) for rank in range(world_size)]
    for rank in ranks:
        rank.set_epoch(2)
    steps = list(zip(*ranks, strict=True))
    assert len(steps) == len(order)
    for index, (parts, expected) in enumerate(zip(steps, order.steps(2), strict=True)):
        batches = [batch for part in parts for batch in part.micro_batches]
        assert sorted(pair for batch in batches for pair in batch) == sorted(expected)
        assert {part.num_pairs for part in parts} == {len(expected)}
        assert len({len(part.micro_batches) for part in parts}) == 1
        assert is_packed or all(len(batch) <= shape.pairs for batch in batches)
        assert parts == tuple(rank.step(index) for rank in ranks)


@pytest.mark.parametrize("drop_last", [False, True])
def test_what_the_log_says(drop_last):
    order = PromptOrder(np.repeat(np.arange(5), [3, 2, 2, 2, 2]), 4, None)
    limit = TokenLimit([10] * 11, 40, [20] * 11)
    sampler = GroupedSampler(order, BatchShape(4, 1, 1), 0, drop_last, limit)
    last = "is left out (dataloader_drop_last)" if drop_last else "is smaller"
    assert sampler.describe_order() == (
        f"11 pairs of 5 prompts, at most 3 of one, in {3 - drop_last} steps of 4 to 5 pairs; the "
        f"last of an epoch, with 2 pairs, {last}"
    )
    even = GroupedSampler(PromptOrder(np.repeat(np.arange(4), 6), 12, 0), BatchShape(12, 1, 1), 0)
    assert even.describe_order() == (
        "24 pairs of 4 prompts, at most 6 of one, in 2 steps of 12 pairs"
    )
    assert sampler.figures().steps == len(sampler) == 3 - drop_last
    assert sampler.mean_pairs() == pytest.approx(4.5 if drop_last else 11 / 3)


def test_one_small_step_is_all_there_is_or_left_out():
    order = PromptOrder(np.array([3, 3, 4]), 8, 1)
    assert sorted(order.steps(0)[0]) == [0, 1, 2]
    kept, dropped = (GroupedSampler(order, BatchShape(8, 1, 1), 0, drop) for drop in (False, True))
    assert kept.order_figures().smallest_step == kept.order_figures().last_step == 3
    assert (len(kept), len(dropped), list(dropped)) == (1, 0, [])


@pytest.mark.parametrize(
    ("num_pairs", "seconds"), [(21_000, 0.5), pytest.param(1_000_000, 3.0, marks=pytest.mark.slow)]
)
def test_large_datasets_are_planned_soon(num_pairs, seconds):
    """21,000 pairs take 20 ms on a quiet core, and a million less than a second."""
    prompts = np.random.default_rng(0).integers(0, num_pairs // 21, num_pairs)
    started = time.perf_counter()
    order = PromptOrder(prompts, 24, 3)
    assert len(order.steps(1)) == len(order)
    assert time.perf_counter() - started < seconds
