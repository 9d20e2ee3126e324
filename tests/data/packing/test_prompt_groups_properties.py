"""Groups of any pairs: rows as long as planned, each pair once, in an order that the head takes."""

from __future__ import annotations

import itertools
import random
import tracemalloc

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpofast.columns import ID_COLUMNS
from dpofast.data.packing.collate import Layout
from dpofast.data.packing.plan import BatchShape, StepSampler
from dpofast.data.packing.prompt_groups import PromptGroups
from dpofast.data.packing.step_dataset import StepDataset
from dpofast.data.packing.token_limit import token_limit
from dpofast_kernels.head.units import cut_units

SHARED = Layout("shared")
# Few tokens, so that answers are equal, begin alike, or begin others.
ids = st.lists(st.integers(3, 4), min_size=1, max_size=5) | st.lists(
    st.integers(3, 5), min_size=1, max_size=1
).map(lambda end: [*[3] * 8, *end])
prompts = st.sampled_from([[3], [4], [3, 4], [3, 4, 3]])
some_pairs = st.lists(st.tuples(prompts, ids, ids), min_size=1, max_size=24)
limits = st.sampled_from([1, 9, 14, 20, 40, 10_000])


def dataset_of(pairs):
    return Dataset.from_list([dict(zip(ID_COLUMNS, pair, strict=True)) for pair in pairs])


def common_prefix(rows):
    """Leading tokens that all rows have."""
    same = [len(set(column)) == 1 for column in zip(*rows, strict=False)]
    return len(list(itertools.takewhile(bool, same)))


def counted(pairs):
    """Tokens of one group with these pairs, from its sequences."""
    whole = {(tuple(prompt), tuple(side)) for prompt, *both in pairs for side in both}
    rows = [prompt + answer for prompt, answer in whole]
    prefix = common_prefix(rows)
    return prefix + sum(len(row) - prefix for row in rows)


def is_one(row, groups):
    """Whether a row has one pair only, which may be there again."""
    return len({frozenset(groups.answers[pair].tolist()) for pair in row}) == 1


@given(some_pairs)
@settings(deadline=None, max_examples=20)
def test_numbers_are_equal_where_ids_are(pairs):
    groups = PromptGroups.of(dataset_of(pairs))
    slots = [(prompt, answer) for prompt, *both in pairs for answer in both]
    numbers = groups.answers.flatten().tolist()
    for one, number in zip(slots, numbers, strict=True):
        assert groups.lengths[number] == len(one[0]) + len(one[1])
        for other, another in zip(slots, numbers, strict=True):
            assert (one == other) == (number == another)
    for i, (prompt, *_) in enumerate(pairs):
        assert [groups.prompts[i] == n for n in groups.prompts] == [p == prompt for p, *_ in pairs]
        assert groups.pair_tokens[i] == counted([pairs[i]])
    ordered = sorted(dict(zip(numbers, slots, strict=True)).items())
    for low, (number, (prompt, answer)) in enumerate(ordered):
        for high, (prompt_2, answer_2) in ordered[low:]:
            if prompt == prompt_2:
                prefix = common_prefix([prompt + answer, prompt + answer_2])
                assert groups.prefix(number, high) == prefix


@given(some_pairs, limits, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=20)
def test_parts_have_each_pair_once_fit_and_save(pairs, limit, rng):
    groups = PromptGroups.of(dataset_of(pairs))
    step = rng.sample(range(len(pairs)), rng.randint(1, len(pairs)))
    parts = groups.parts(step, limit)
    assert sorted(pair for part in parts for pair in part.pairs) == sorted(step)
    for part in parts:
        assert part.tokens == counted([pairs[pair] for pair in part.pairs])
        assert part.tokens <= limit or is_one(part.pairs, groups)
        assert part.tokens <= sum(groups.pair_tokens[part.pairs])
        assert len({groups.prompts[pair] for pair in part.pairs}) == 1


@given(some_pairs, limits, st.integers(1, 3), st.booleans(), st.booleans())
@example([([3], [3], [3]), ([3], [3], [4]), ([3], [4], [3])], 10_000, 1, True, True)
@example([([3], [3], [4]), ([3], [3, 3], [5]), ([3], [4], [3])], 10_000, 1, True, True)
@settings(deadline=None, max_examples=20)
def test_rows_are_as_long_as_planned_and_right(pairs, max_tokens, world_size, is_packed, agree):
    """On every rank, and for pairs that agree on the reference's log-prob or don't."""
    dataset = dataset_of(pairs)
    groups = PromptGroups.of(dataset)
    layout = SHARED if is_packed else Layout("padded")
    limit = token_limit(groups, layout, max_tokens)
    ref_logps = groups.answers * -1.5
    if not agree:
        ref_logps[:, 1] -= np.arange(len(pairs))
    steps = StepDataset(dataset, ref_logps, layout, groups=groups)
    seen = []
    for rank in range(world_size):
        shape = BatchShape(4, 2, world_size)
        for planned in StepSampler(len(pairs), shape, rank, seed=None, limit=limit):
            step = steps.__getitems__(planned)
            for i, (batch, row, own) in enumerate(
                zip(step.micro_batches, planned.micro_batches, step.indices, strict=True)
            ):
                assert sorted(row) == sorted(own)
                seen += own
                check_batch(batch, own, pairs, ref_logps)
                if limit is not None:
                    tokens = sum(counted([pairs[i] for i in part]) for part in planned.parts[i])
                    assert batch.input_ids.numel() == max(tokens, 1)
                    assert tokens <= max_tokens or is_one(row, groups)
    assert sorted(seen) == list(range(len(pairs)))


def check_batch(batch, own, pairs, ref_logps):
    """Assert that a micro-batch has these pairs, and that the head takes their order."""
    assert batch.num_pairs == len(own)
    assert batch.ref_logps.tolist() == ref_logps[own].flatten().tolist()
    assert batch.of_pairs(batch.ref_of_sequences()).tolist() == batch.ref_logps.tolist()
    both = None if batch.pairs is None else [tuple(pair) for pair in batch.pairs.tolist()]
    units = cut_units(batch.bounds.tolist(), both)
    assert sum(unit.num_pairs for unit in units) == len(own)
    sequences = batch.of_pairs(numbers_of(batch)).view(-1, 2).tolist()
    plain = sum(
        len(row[0]) * 2 + len(row[1]) + len(row[2]) for row in (pairs[pair] for pair in own)
    )
    assert batch.num_tokens == plain
    if own:
        assert batch.uses.sum() == plain
    labels = batch.labels.split(batch.bounds.diff().tolist())
    places = batch.scored_positions.split(batch.bounds.diff().tolist())
    inputs = batch.input_ids.flatten()
    for pair, (chosen, rejected) in zip(own, sequences, strict=True):
        assert chosen != rejected
        prompt, *answers = pairs[pair]
        for sequence, answer in zip((chosen, rejected), answers, strict=True):
            assert labels[sequence].tolist() == answer
            # Each label's place has the token before it.
            assert inputs[places[sequence]].tolist() == [*prompt, *answer][len(prompt) - 1 : -1]


def numbers_of(batch):
    return batch.bounds[:-1].new_tensor(range(len(batch.bounds) - 1))


@pytest.mark.parametrize("make", ["star", pytest.param("chain", marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_square_of_the_answers(make):
    """Twice the answers to a prompt take about twice the memory."""
    peaks = []
    for count in (300, 600, 1200):
        rng = random.Random(0)
        answers = [[rng.randrange(9) for _ in range(20)] for _ in range(count)]
        first = (lambda i: 0) if make == "star" else (lambda i: i - 1)
        dataset = dataset_of([([1], answers[first(i)], answers[i]) for i in range(1, count)])
        tracemalloc.start()
        groups = PromptGroups.of(dataset)
        assert len(groups.parts(range(count - 1))) < 5
        groups.parts(range(count - 1), 1000)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] - peaks[1] < 2.5 * (peaks[1] - peaks[0]) + 30_000
