"""The plan of real pairs: how even the rows of a step are, on one rank and on several."""

from __future__ import annotations

import pytest

from benchmarks.data import find_data, race_tokenizer
from dpofast.data import load_preferences, tokenize_preferences
from dpofast.data.packing.collate import Layout
from dpofast.data.packing.plan import BatchShape, StepSampler
from dpofast.data.packing.step_dataset import token_limit

PAIRS_PER_STEP, MAX_TOKENS = 32, 8_192


@pytest.fixture(scope="module")
def limit():
    path = find_data("dpo_en_demo")[0]
    pairs, _ = tokenize_preferences(load_preferences(path), race_tokenizer(path), max_length=None)
    return token_limit(pairs, Layout("shared"), MAX_TOKENS)


def epoch(limit, ranks, seed):
    """Of every step, the pairs of each row of all ranks."""
    num_pairs, shape = len(limit.lengths), BatchShape(PAIRS_PER_STEP // ranks, 1, ranks)
    samplers = [StepSampler(num_pairs, shape, rank, seed, limit=limit) for rank in range(ranks)]
    return [
        [row for part in step for row in part.micro_batches] for step in zip(*samplers, strict=True)
    ]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_rows_of_a_step_are_even(limit, ranks):
    """With the default seed, the last step of twelve pairs included."""
    steps = epoch(limit, ranks, seed=42)
    assert [sum(map(len, rows)) for rows in steps] == [32] * 9 + [12]
    imbalances = []
    for rows in steps:
        tokens = [sum(limit.lengths[pair] for pair in row) for row in rows]
        assert max(tokens) <= MAX_TOKENS
        imbalances.append(max(tokens) * len(tokens) / sum(tokens))
    print(f"{ranks} ranks: mean {sum(imbalances) / len(imbalances):.4f}, max {max(imbalances):.4f}")
    assert sum(imbalances) / len(imbalances) <= 1.02
    assert max(imbalances) <= 1.06


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("seed", range(46, 54))
def test_what_is_uneven_is_a_pair_that_no_plan_could_split(limit, ranks, seed):
    """The longest pair has 4,400 tokens: rows of four ranks may have fewer on average."""
    for rows in epoch(limit, ranks, seed):
        tokens = [sum(limit.lengths[pair] for pair in row) for row in rows]
        if max(tokens) * len(tokens) > 1.06 * sum(tokens):
            assert len(rows[tokens.index(max(tokens))]) == 1
