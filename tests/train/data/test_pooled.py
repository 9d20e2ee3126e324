"""A run on rows with many answers is the run on the pairs that they stand for."""

from __future__ import annotations

import random

import numpy as np
import pytest

from dpofast.data import PooledPairs
from tests.support import VOCAB_SIZE, make_trainer, train


def ranked_rows(num_rows=6, num_answers=4, seed=0):
    """Tokenised rows with a score for each answer; the last two scores are equal."""
    rng = random.Random(seed)

    def ids(low, high):
        return [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randint(low, high))]

    scores = [*range(num_answers - 1, 0, -1), 1]
    return [
        {
            "prompt_ids": ids(2, 9),
            "completions_ids": [ids(1, 8) for _ in range(num_answers)],
            "scores": rng.sample(scores, num_answers),
            "weight": 0.5 + row % 2,
        }
        for row in range(num_rows)
    ]


def paired_rows(rows):
    """The same data, written as one row for each pair."""
    pairs = []
    for row in rows:
        answers, scores = row["completions_ids"], row["scores"]
        for i in range(len(answers)):
            for j in range(i + 1, len(answers)):
                if scores[i] != scores[j]:
                    chosen, rejected = (i, j) if scores[i] > scores[j] else (j, i)
                    pair = {"prompt_ids": row["prompt_ids"], "chosen_ids": answers[chosen]}
                    pairs.append(
                        {**pair, "rejected_ids": answers[rejected], "weight": row["weight"]}
                    )
    return pairs


ROWS = ranked_rows()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layout": "padded"},
        {"dataloader_num_workers": 2},
        {"ld_alpha": 0.3},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]},
    ],
    ids=lambda options: next(iter(options), "default"),
)
def test_a_run_has_the_losses_and_gradients_of_the_equivalent_pairs(tmp_path, options):
    ranked = make_trainer(tmp_path, pairs=ROWS, options={"max_steps": 3, **options})
    assert isinstance(ranked.train_dataset, PooledPairs)
    found = train(ranked)
    plain = make_trainer(tmp_path, pairs=paired_rows(ROWS), options={"max_steps": 3, **options})
    assert plain.train_dataset["prompt_ids"][:] == ranked.train_dataset["prompt_ids"]
    np.testing.assert_allclose(found, train(plain), rtol=1e-6)
    report = plain.reference.store.reports["train"]
    # The store of one run has every row that the other one needs.
    assert (report.rows_scored, report.forward_passes) == (0, 0)
    assert report.rows_needed == len(ranked.train_dataset.answers)
