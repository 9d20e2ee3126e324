"""Groups of pairs that have the same prompt: how many tokens they take, and where they are cut."""

from __future__ import annotations

import itertools
import random
import time

import numpy as np
import pytest
from datasets import Dataset

from dpofast.data.packing.collate import Layout
from dpofast.data.packing.plan import BatchShape, StepSampler
from dpofast.data.packing.prompt_groups import PromptGroups
from dpofast.data.packing.step_dataset import StepDataset
from dpofast.data.packing.token_limit import token_limit

PROMPT = [1, 2, 3]


def dataset(*pairs):
    """Pairs (prompt, chosen, rejected) of token ids."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return Dataset.from_dict({name: [pair[i] for pair in pairs] for i, name in enumerate(names)})


def pairs_of_pools(num_prompts, num_answers, length=12, seed=0):
    """All pairs of some answers to each prompt."""
    rng = random.Random(seed)
    found = []
    for _ in range(num_prompts):
        prompt = [rng.randrange(9) for _ in range(length)]
        answers = [[rng.randrange(9) for _ in range(length)] for _ in range(num_answers)]
        found += [(prompt, *both) for both in itertools.combinations(answers, 2)]
    return dataset(*found)


def counted(pairs):
    """Tokens of a row of one group, counted from sets of prefixes: the group shares one prefix."""
    sequences = {(tuple(pair["prompt_ids"]), tuple(pair[side])) for pair in pairs for side in SIDES}
    whole = [prompt + answer for prompt, answer in sequences]
    if len(whole) == 1:
        return len(whole[0])
    prefix = 0
    while all(len(each) > prefix and each[prefix] == whole[0][prefix] for each in whole):
        prefix += 1
    return prefix + sum(len(each) - prefix for each in whole)


SIDES = ("chosen_ids", "rejected_ids")


def test_equal_prompts_and_answers_have_equal_numbers():
    groups = PromptGroups.of(
        dataset((PROMPT, [4], [5]), ([1], [4], [5]), (PROMPT, [5], [4, 6]), (PROMPT, [5], [4]))
    )
    assert groups.prompts.tolist() == [0, 1, 0, 0]
    (one, other), (far, _), (same, longer), _ = groups.answers.tolist()
    assert other == same, "an answer that is rejected in one pair and chosen in another"
    assert len({one, other, far, longer}) == 4, "an answer to another prompt is another one"
    assert groups.answers[3].tolist() == [other, one]
    assert groups.lengths[groups.answers].tolist() == [[4, 4], [2, 2], [4, 5], [4, 4]]
    assert groups.pair_tokens.tolist() == [5, 3, 6, 5]


def test_a_group_shares_one_prefix_and_runs_each_answer_once():
    pairs = pairs_of_pools(1, 4)
    groups = PromptGroups.of(pairs)
    (part,) = groups.parts(range(6))
    assert sorted(part.pairs) == list(range(6))
    assert part.tokens == counted(pairs) < sum(groups.pair_tokens)


def test_a_group_longer_than_a_row_is_cut_into_parts_that_fit():
    pairs = pairs_of_pools(1, 7)
    groups = PromptGroups.of(pairs)
    parts = groups.parts(range(21), 12 + 4 * 12)
    assert len(parts) > 1
    assert sorted(pair for part in parts for pair in part.pairs) == list(range(21))
    for part in parts:
        assert part.tokens == counted(pairs.select(part.pairs)) <= 60
    limit = token_limit(groups, Layout("shared"), 60)
    assert (
        limit.repeats(parts)
        == sum(len(np.unique(groups.answers[part.pairs])) for part in parts) - 7
    )


def test_pairs_that_need_more_tokens_together_stay_apart():
    """Two rewritten answers: each pair shares all but its end, the two share only the prompt."""
    first, second = [5] * 30, [6] * 30
    groups = PromptGroups.of(
        dataset((PROMPT, [*first, 7], [*first, 8]), (PROMPT, [*second, 7], second))
    )
    parts = groups.parts([0, 1])
    assert [part.pairs for part in parts] == [[0], [1]]
    assert [part.tokens for part in parts] == groups.pair_tokens.tolist() == [35, 34]


def test_linked_pairs_are_neighbours():
    a, b, c, d, e = ([each, 9] for each in range(4, 9))
    pairs = dataset((PROMPT, a, b), (PROMPT, c, d), (PROMPT, b, e), (PROMPT, a, b))
    (part,) = PromptGroups.of(pairs).parts([3, 1, 0, 2])
    assert part.pairs == [3, 0, 2, 1]


def test_a_pair_longer_than_a_row_is_a_part_of_its_own():
    pairs = dataset((PROMPT, [4] * 9, [5] * 9), (PROMPT, [4], [6]), (PROMPT, [6], [7]))
    parts = PromptGroups.of(pairs).parts([0, 1, 2], 10)
    assert sorted(part.pairs for part in parts) == [[0], [1, 2]]


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_a_micro_batch_has_each_answer_once(layout):
    pairs = pairs_of_pools(2, 4)
    ref_logps = PromptGroups.of(pairs).answers * -1.0  # the same for all pairs of an answer
    steps = StepDataset(pairs, ref_logps, Layout(layout))
    (batch,) = steps[3].micro_batches
    assert batch.pairs is None, "a pair by itself"
    sampler = StepSampler(12, BatchShape(12, 1, 1), 0, seed=None)
    (step,) = (steps.__getitems__(planned) for planned in sampler)
    (batch,) = step.micro_batches
    assert len(batch.bounds) - 1 == 8
    assert batch.num_pairs == 12 == step.num_pairs
    assert batch.lengths.tolist() == [[12, 12]] * 12
    assert batch.num_tokens == 24 * 24
    assert batch.ref_logps.tolist() == ref_logps[list(step.indices[0])].flatten().tolist()
    labels = [part.tolist() for part in batch.labels.split(12)]
    for pair, both in zip(step.indices[0], batch.pairs.tolist(), strict=True):
        assert [labels[sequence] for sequence in both] == [pairs[pair][side] for side in SIDES]
    assert batch.uses.sum() == batch.num_tokens


def test_an_answer_with_two_reference_log_probs_is_scored_for_each():
    pairs = dataset((PROMPT, [4], [5]), (PROMPT, [5], [6]))
    steps = StepDataset(pairs, np.array([[-1.0, -2.0], [-2.5, -3.0]]), Layout("shared"))
    (batch,) = steps.__getitems__(
        next(iter(StepSampler(2, BatchShape(2, 1, 1), 0, None)))
    ).micro_batches
    assert batch.pairs is None
    assert batch.labels.tolist() == [4, 5, 5, 6]
    assert batch.input_ids.tolist() == [[*PROMPT, 4, 5, 6]], "the body runs it once"


def test_a_pool_is_planned_fast():
    pairs = pairs_of_pools(1000, 7, length=60)
    seconds = []
    for _ in range(3):  # the best of three, as other work can slow down any of them
        start = time.perf_counter()
        limit = token_limit(PromptGroups.of(pairs), Layout("shared"), 2048)
        sampler = StepSampler(len(pairs), BatchShape(24, 1, 1), 0, seed=None, limit=limit)
        planned = [pair for step in sampler for row in step.micro_batches for pair in row]
        seconds.append(time.perf_counter() - start)
        assert sorted(planned) == list(range(len(pairs)))
    assert min(seconds) < 1.0


def test_pairs_that_do_not_fit_a_full_part_cost_little(monkeypatch):
    pairs = itertools.combinations([[answer, 5] for answer in range(10, 40)], 2)
    groups = PromptGroups.of(dataset(*((PROMPT, *both) for both in pairs)))
    calls, prefix = [], PromptGroups.prefix
    monkeypatch.setattr(
        PromptGroups, "prefix", lambda self, *ends: calls.append(ends) or prefix(self, *ends)
    )
    parts = groups.parts(range(435), len(PROMPT) + 12)
    assert sum(len(part.pairs) for part in parts) == 435
    assert len(calls) < 2 * 435, "of about 30,000 if each part looked at all that is left"
