"""A run on rows with many answers is the run on the pairs that are made of them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from dpofast import DPOConfig
from dpofast.data import PooledPairs, mix_preferences
from dpofast.errors import CheckpointError, DataError
from dpofast.train.data.dataset import PairPreparer
from tests.support import (
    VOCAB_SIZE,
    answer_logps,
    history,
    make_trainer,
    run_config,
    tiny_llama,
    train,
)


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
                    pair = {name: row[name] for name in ("prompt_ids", "weight")}
                    ids = {"chosen_ids": answers[chosen], "rejected_ids": answers[rejected]}
                    pairs.append({**pair, **ids})
    return pairs


ROWS = ranked_rows()


def without_rows(pairs):
    """The pairs without the numbers of their rows, which differ between the two ways of writing."""
    return [{name: value for name, value in pair.items() if name != "row"} for pair in pairs]


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]},
        {"ld_alpha": 0.3},
        pytest.param({"layout": "padded"}, marks=pytest.mark.slow),
        pytest.param({"dataloader_num_workers": 2}, marks=pytest.mark.slow),
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_run_has_the_losses_and_gradients_of_the_equivalent_pairs(tmp_path, options):
    options = {"max_steps": 3, **options}
    ranked = make_trainer(tmp_path, pairs=ROWS, options=options)
    assert isinstance(ranked.train_dataset, PooledPairs)
    found = train(ranked)
    plain = make_trainer(tmp_path, pairs=paired_rows(ROWS), options=options)
    assert without_rows(plain.train_dataset) == without_rows(ranked.train_dataset)
    np.testing.assert_allclose(found, train(plain), rtol=1e-6)
    np.testing.assert_array_equal(ranked.train_set().ref_logps, plain.train_set().ref_logps)
    # The store that one run has made has every row that the other one needs.
    report = plain.reference.store.reports["train"]
    assert (report.rows_scored, report.forward_passes) == (0, 0)
    assert report.rows_needed == len(ranked.train_dataset.answers)


def test_a_mixture_of_ranked_and_paired_rows_trains_and_is_evaluated_by_its_sets(tmp_path):
    sets = {"a.jsonl": ROWS[:3], "b.jsonl": paired_rows(ROWS[3:])}
    held_out = {"ranked": ranked_rows(2, 3, seed=1), "paired": paired_rows(ROWS[:1])}
    mixture = mix_preferences(sets)
    options = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(tmp_path, pairs=mixture, eval_dataset=held_out, options=options)
    assert trainer.train_set().sources == {"a.jsonl": 15, "b.jsonl": 15}
    losses = train(trainer)
    assert {"eval_ranked_loss", "eval_paired_loss"} <= set().union(*trainer.state.log_history)
    plain = mix_preferences({"a.jsonl": paired_rows(ROWS[:3]), "b.jsonl": paired_rows(ROWS[3:])})
    other = make_trainer(tmp_path, pairs=plain, options={"max_steps": 2})
    assert without_rows(other.train_dataset) == without_rows(trainer.train_dataset)
    np.testing.assert_allclose(losses, train(other), rtol=1e-6)
    found, expected = trainer.evaluate(mixture), other.evaluate(plain)
    of_sets = [name for name in expected if "/a" in name or "/b" in name or "_a" in name]
    assert of_sets
    for name in of_sets:
        assert found[name] == pytest.approx(expected[name], rel=1e-6), name


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path, pairs=ROWS, options=options)
    whole.train()
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    again = make_trainer(tmp_path, pairs=ROWS, options=options)
    again.train(resume_from_checkpoint=checkpoint)
    assert history(again) == history(whole)
    other = [{**ROWS[0], "scores": ROWS[0]["scores"][::-1]}, *ROWS[1:]]
    with pytest.raises(CheckpointError, match="data: "):
        make_trainer(tmp_path, pairs=other, options=options).train(checkpoint)


def test_an_answer_that_the_model_cannot_take_is_named_by_its_row(tmp_path, caplog):
    config = run_config(tmp_path, DPOConfig, None)
    unknown = [ROWS[0], {**ROWS[1], "completions_ids": [[5], [6], [VOCAB_SIZE], [7]]}]
    with pytest.raises(DataError, match=r"train, row 1 .*: the token id 259 in completion_ids"):
        PairPreparer(config, None, [tiny_llama()]).prepare(unknown, "train")
    long = [ROWS[0], {**ROWS[1], "completions_ids": [[5], [6], [8] * 300, [7]]}]
    PairPreparer(config, None, [tiny_llama()]).prepare(long, "train")
    assert "train: 1 answers are longer than the 256 positions of" in caplog.text


def test_some_pairs_of_a_run_can_be_evaluated(tmp_path):
    trainer = make_trainer(tmp_path, pairs=ROWS)
    some = trainer.train_dataset.select([3, 4, 11])
    pairs = [paired_rows(ROWS)[pair] for pair in (3, 4, 11)]
    assert trainer.evaluate(some)["eval_loss"] == trainer.evaluate(pairs)["eval_loss"]


def test_pairs_get_the_reference_log_probs_of_their_answers(tmp_path):
    trainer = make_trainer(tmp_path, pairs=ROWS)
    trainer.score_datasets()
    dataset = trainer.train_set()
    index, logps = dataset.pairs.index, dataset.ref_logps
    for answer in np.unique(index):
        assert len(set(logps[index == answer])) == 1
    pair = dataset.pairs[7]
    with torch.no_grad():
        sides = [pair["chosen_ids"], pair["rejected_ids"]]
        expected = [answer_logps(tiny_llama(), pair["prompt_ids"], ids).item() for ids in sides]
    np.testing.assert_allclose(logps[7], expected, rtol=1e-5)
