"""Plans: the same pairs in each step on any number of ranks, in even rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.data import find_data, race_tokenizer
from dpofast.data import load_preferences, tokenize_preferences
from dpofast.data.packing.collate import Layout
from dpofast.data.packing.plan import BatchShape, StepSampler, split_step
from dpofast.data.packing.prompt_groups import PromptGroups
from dpofast.data.packing.token_limit import TokenLimit, token_limit

REAL_PAIRS_PER_STEP, REAL_MAX_TOKENS = 32, 8_192


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


def test_without_a_seed_the_order_is_that_of_the_dataset():
    steps = list(StepSampler(5, BatchShape(2, 1, 1), 0, seed=None))
    assert [list(step.micro_batches) for step in steps] == [[[0, 1]], [[2, 3]], [[4]]]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_packed_steps_have_the_same_pairs_as_padded_ones(world_size):
    shape = BatchShape(2, 2, world_size)
    lengths = [5 + 7 * index % 31 for index in range(21)]
    limit = TokenLimit(lengths, 40, [2 * length for length in lengths])
    plain = [list(StepSampler(21, shape, rank, seed=5)) for rank in range(world_size)]
    packed = [list(StepSampler(21, shape, rank, seed=5, limit=limit)) for rank in range(world_size)]
    for step in range(len(plain[0])):
        expected = sorted(
            pair for rank in plain for row in rank[step].micro_batches for pair in row
        )
        rows = [row for rank in packed for row in rank[step].micro_batches]
        assert sorted(pair for row in rows for pair in row) == expected
        assert len({len(rank[step].micro_batches) for rank in packed}) == 1
        assert {rank[step].num_pairs for rank in packed} == {len(expected)}
        assert all(sum(lengths[pair] for pair in row) <= 40 or len(row) == 1 for row in rows)


def test_the_sentence_about_a_packed_plan():
    limit = TokenLimit([10, 20, 30, 50], 40, [50] * 4)
    sampler = StepSampler(4, BatchShape(4, 1, 1), 0, seed=None, limit=limit)
    sentence = sampler.describe(sampler.figures())
    assert sentence.startswith("3 rows in 1 step, filled to 92% of 40 tokens; 1 pair is longer")
    assert "45.0% fewer tokens" in sentence
    assert StepSampler(4, BatchShape(4, 1, 1), 0, seed=None).figures() is None


@pytest.fixture(scope="module")
def real_limit():
    path = find_data("dpo_en_demo")[0]
    pairs, _ = tokenize_preferences(load_preferences(path), race_tokenizer(path), max_length=None)
    return token_limit(PromptGroups.of(pairs), Layout("shared"), REAL_MAX_TOKENS)


def real_epoch(limit, ranks, seed):
    """The pairs in each row of all ranks, for each step."""
    num_pairs, shape = len(limit.lengths), BatchShape(REAL_PAIRS_PER_STEP // ranks, 1, ranks)
    samplers = [StepSampler(num_pairs, shape, rank, seed, limit=limit) for rank in range(ranks)]
    return [
        [row for part in step for row in part.micro_batches] for step in zip(*samplers, strict=True)
    ]


def row_tokens(limit, row):
    """Tokens of a row; pairs of one prompt share it, so they have fewer than they have apart."""
    return sum(part.tokens for part in limit.parts(row))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_rows_of_a_real_step_are_even(real_limit, ranks):
    """With the default seed; the last step has only twelve pairs."""
    steps = real_epoch(real_limit, ranks, seed=42)
    assert [sum(map(len, rows)) for rows in steps] == [32] * 9 + [12]
    imbalances = []
    for rows in steps:
        tokens = [row_tokens(real_limit, row) for row in rows]
        assert max(tokens) <= REAL_MAX_TOKENS
        imbalances.append(max(tokens) * len(tokens) / sum(tokens))
    print(f"{ranks} ranks: mean {sum(imbalances) / len(imbalances):.4f}, max {max(imbalances):.4f}")
    assert sum(imbalances) / len(imbalances) <= 1.02
    assert max(imbalances) <= 1.06


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("seed", range(46, 54))
def test_an_uneven_row_is_a_pair_that_no_plan_could_split(real_limit, ranks, seed):
    """The longest pair has 4,400 tokens, and the mean row of four ranks can have fewer."""
    for rows in real_epoch(real_limit, ranks, seed):
        tokens = [row_tokens(real_limit, row) for row in rows]
        if max(tokens) * len(tokens) > 1.06 * sum(tokens):
            assert len(rows[tokens.index(max(tokens))]) == 1


def test_pairs_of_a_prompt_share_a_padded_micro_batch():
    """Then an answer that several of them have runs once."""
    prompts = np.array([0, 1, 0, 1, 2, 0])
    shape = BatchShape(3, 2, 1)
    (step,) = StepSampler(6, shape, 0, seed=None, prompts=prompts)
    assert step.micro_batches == ([0, 2, 5], [1, 3, 4])
    (plain,) = StepSampler(6, shape, 0, seed=None, prompts=np.arange(6))
    assert plain.micro_batches == ([0, 1, 2], [3, 4, 5]), "that of plain DPO"
