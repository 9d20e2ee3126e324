"""Pairs of a prompt in groups against separate sequences, one pair at a time, in float64."""

from __future__ import annotations

import functools
import itertools
import random

import pytest
import torch

from dpofast.data.packing.collate import Layout
from tests.exactness import assert_alike, separate
from tests.families import PACKABLE_FAMILIES, UNPACKABLE_FAMILIES, tiny_model
from tests.groups import Pool, all_pairs, case_of_pools, chain, grouped, rows_of, star
from tests.support import float64_throughout

SHARED, PADDED = Layout("shared"), Layout("padded")
LENGTHS = [(0, 0, 9), (0, 0, 4), (0, 3, 5), (0, 3, 1), (0, 0, 1), (0, 0, 12), (0, 0, 6)]
ALIKE = [(3, 2, 4), (3, 2, 1), (3, 0, 6), (3, 1, 5)]  # they begin alike
BEGIN = [[7, 8], [7, 8, 9], [7], [7, 8, 9, 7, 8, 9]]  # each begins longer ones
# Three have so much in common that running one twice is cheaper than losing their prefix.
APART = [[*[5] * 15, 1], [*[5] * 15, 2, 3], [*[5] * 15, 4], [6]]
POOLS = {
    **{f"all of {n}": Pool(11, LENGTHS[:n], all_pairs(n)) for n in (2, 3, 4, 7)},
    **{f"chain of {n}": Pool(8, LENGTHS[:n], chain(n)) for n in (3, 4, 7)},
    **{f"star of {n}": Pool(8, LENGTHS[:n], star(n)) for n in (3, 4, 7)},
    "disjoint": Pool(9, LENGTHS, [(0, 1), (2, 3), (5, 4)]),
    "a pair again": Pool(6, LENGTHS, [(0, 1), (1, 0), (0, 1), (1, 2)]),
    "alike": Pool(5, ALIKE, all_pairs(4)),
    "beginnings": Pool(5, BEGIN, all_pairs(4)),
    "apart": Pool(4, APART, all_pairs(4)),
    "answers of one text": Pool(6, [[5, 6, 7], [5, 6, 7], [8]], all_pairs(3)),
    "one token": Pool(1, LENGTHS, all_pairs(4)),
    "one token, alike": Pool([3], ALIKE, chain(4)),
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def model_of(family):
    return tiny_model(family).double()


@functools.cache
def expected_of(family, *pools):
    """The model, and what separate sequences give for these pools."""
    with float64_throughout():
        return separate(model_of(family), case_of_pools(*pools))


def compare_groups(family, pools, layout, max_tokens=1_000_000, **head_options):
    """Assert that groups and separate sequences give the same, within the bounds of the others."""
    expected, model = expected_of(family, *pools), model_of(family)
    with float64_throughout():
        found = grouped(model, case_of_pools(*pools), layout, max_tokens, **head_options)
    assert_alike(found, expected)


MANY = tuple(POOLS.values())
QUICK = ("llama", "gemma2")


@pytest.mark.parametrize("layout", [SHARED, PADDED], ids=lambda layout: layout.name)
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=[] if family in QUICK else pytest.mark.slow)
        for family in PACKABLE_FAMILIES
    ],
)
def test_many_prompts_of_a_step_equal_separate_pairs(family, layout):
    compare_groups(family, MANY, layout)


def test_the_pools_are_grouped_as_they_are_meant_to_be():
    """Without this, a group that is never made would pass all tests of this file."""
    sizes = {}
    for name, pool in POOLS.items():
        (batch,), _ = rows_of(case_of_pools(pool), SHARED, 1_000_000)
        plain = sum(len(prompt) + len(answer) for prompt, answer in case_of_pools(pool).sequences)
        assert batch.num_tokens == plain == batch.uses.sum()
        sizes[name] = len(batch.bounds) - 1
    answers = {name: len({i for pair in pool.pairs for i in pair}) for name, pool in POOLS.items()}
    # Pairs of the same answer twice stand alone, and "apart" is cut.
    assert sizes.pop("answers of one text") == 2 + answers.pop("answers of one text") - 1
    assert sizes.pop("apart") > answers.pop("apart")
    assert sizes == answers
    # Padded rows share no prefix, so that nothing is saved by cutting a group.
    (batch,), _ = rows_of(case_of_pools(POOLS["apart"]), PADDED, 1_000_000)
    assert len(batch.bounds) - 1 == len(APART)


@pytest.mark.parametrize("max_tokens", [1, 30, 47])
def test_a_group_longer_than_a_row_is_cut_and_exact(max_tokens):
    pools = (POOLS["all of 7"], POOLS["beginnings"], POOLS["alike"])
    batches, order = rows_of(case_of_pools(*pools), SHARED, max_tokens)
    assert len(batches) > 1
    assert sorted(order) == list(range(21 + 6 + 6))
    again = sum(len(batch.bounds) - 1 for batch in batches) - 7 - 4 - 4
    assert again > 0, "answers that run again"
    for batch in batches:
        assert batch.input_ids.numel() <= max_tokens or batch.num_pairs == 1
    compare_groups("llama", pools, SHARED, max_tokens)


def test_other_prompts_with_the_same_answers_share_nothing():
    """As with other tools or chat_template_kwargs: other ids, of which one may begin another."""
    prompt, answers = [11, 12, 13, 14], [[5, 6], [7], [5, 8, 9]]
    pools = [
        Pool(ids, answers, all_pairs(3))
        for ids in (prompt, [*prompt, 15], [10, *prompt], [*prompt, *answers[0]])
    ]
    (batch,), _ = rows_of(case_of_pools(*pools), SHARED, 1_000_000)
    assert len(batch.bounds) - 1 == 4 * 3
    # Each group: the prompt once, and answers of 2 + 1 + 3 tokens.
    assert batch.input_ids.numel() == sum(len(pool.prompt) + 6 for pool in pools)
    for layout in (SHARED, PADDED):
        compare_groups("llama", tuple(pools), layout)


HEADS = [
    # chunks of 16 rows, fewer than a group has
    pytest.param(MANY, {"workspace_bytes": 1}, id="torch in small chunks"),
    pytest.param(
        *((POOLS["all of 3"],), {"backend": "triton"}), marks=pytest.mark.slow, id="triton"
    ),
    pytest.param(
        (POOLS["all of 3"], POOLS["alike"]),
        {"backend": "triton", "workspace_bytes": 97 * 8 * 5},
        id="triton in small chunks",
    ),
    pytest.param(
        *(MANY, {"backend": "triton", "workspace_bytes": 97 * 8 * 40}),
        marks=pytest.mark.slow,
        id="triton, all pools",
    ),
]


@pytest.mark.parametrize(("pools", "head_options"), HEADS)
def test_the_heads_ways_are_exact(pools, head_options):
    compare_groups("llama", pools, SHARED, **head_options)


# All at once, the pools are compared above for each family. By itself, a pool tells which it is.
@pytest.mark.torture
@pytest.mark.parametrize("layout", [SHARED, PADDED], ids=lambda layout: layout.name)
@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("family", PACKABLE_FAMILIES)
def test_each_pool_equals_separate_pairs(family, name, layout):
    compare_groups(family, (POOLS[name],), layout)


@pytest.mark.slow
@pytest.mark.parametrize("family", PACKABLE_FAMILIES)
def test_cut_groups_are_exact(family):
    for max_tokens in (1, 25, 40, 60, 90):
        compare_groups(family, MANY, SHARED, max_tokens)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=[] if family == "bloom" else pytest.mark.slow)
        for family in UNPACKABLE_FAMILIES
    ],
)
def test_models_that_are_padded_run_answers_once_as_well(family):
    compare_groups(family, MANY, PADDED)


@pytest.mark.slow
@pytest.mark.parametrize("num_answers", [2, 3])
def test_all_subsets_of_pairs(num_answers):
    every = [*itertools.permutations(range(num_answers), 2)]
    for count in range(1, len(every) + 1):
        for pairs in itertools.combinations(every, count):
            for answers in (LENGTHS, ALIKE, APART, BEGIN):
                pool = Pool(4, answers[:num_answers], pairs)
                compare_groups("llama", (pool,), SHARED)


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(seed, marks=pytest.mark.slow if seed < 10 else pytest.mark.torture)
        for seed in range(60)
    ],
)
def test_random_subsets_of_pairs_of_many_answers(seed):
    """In rows of any length, with any head chunks."""
    rng = random.Random(seed)
    pools = []
    for num_answers in (4, 7, 4, 7):
        every = [*itertools.permutations(range(num_answers), 2)]
        starts = rng.choice([0, 1, 4]), rng.choice([0, 2, 9])
        answers = [
            (*(rng.randint(0, start) for start in starts), rng.randint(1, 7))
            for _ in range(num_answers)
        ]
        pairs = rng.choices(every, k=rng.randint(1, 3 * num_answers))
        pools.append(Pool(rng.randint(1, 9), answers, pairs))
    family, limit = rng.choice(["llama", "gemma2", "gpt_oss"]), rng.choice([1, 30, 60, 10_000])
    size = rng.choice([None, 1])
    compare_groups(family, tuple(pools), SHARED, limit, workspace_bytes=size)
    compare_groups(family, tuple(pools), PADDED)
