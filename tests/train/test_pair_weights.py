"""Weighted pairs with soft labels train as a textbook loop with their formulas, in fp64."""

from __future__ import annotations

import math

import datasets
import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from dpofast.data import mix_preferences
from dpofast.errors import CheckpointError, ConfigError, DataError
from tests.support import (
    BETA,
    LEARNING_RATE,
    PlainDPO,
    answer_logps,
    float64_throughout,
    make_trainer,
    naive_margin,
    tiny_llama,
    token_pairs,
    train,
)

WEIGHTS = (1.0, 0.0, 0.25, 3.0)
CONFIDENCES = (0.9, 0.55, 0.8, 0.6)


def sigmoid(z, norm, e):
    return -(1 - e) * logsigmoid(z) - e * logsigmoid(-z)


def sigmoid_norm(z, norm, e):
    return sigmoid(norm, norm, e)


def robust(z, norm, e):
    return (-(1 - e) * logsigmoid(z) + e * logsigmoid(-z)) / (1 - 2 * e)


def exo_pair(z, norm, e):
    q = torch.sigmoid(z)
    return q * (q.log() - math.log(1 - e)) + (1 - q) * ((1 - q).log() - math.log(e))


FORMULAS = {each.__name__: each for each in (sigmoid, sigmoid_norm, robust, exo_pair)}


def weighted_pairs(num_pairs=10, *, seed=0, confidences=CONFIDENCES):
    """Tokenised pairs with a weight and a confidence each; without confidences if that is None."""
    pairs = token_pairs(num_pairs, seed)
    repeated = [n % 4 for n in range(num_pairs)]
    pairs = pairs.add_column("weight", [WEIGHTS[n] for n in repeated])
    if confidences is None:
        return pairs
    return pairs.add_column("label_confidence", [confidences[n] for n in repeated])


class PlainWeighted(PlainDPO):
    """The textbook loop with a formula of margins and of a pair's label smoothing.

    Args:
        formula: z and its length-normalised form [], and a probability -> loss [].
    """

    def __init__(self, formula, *args):
        super().__init__(*args)
        self.formula = formula

    def loss(self, pair):
        a, b = (
            self._logratio(pair["prompt_ids"], pair[f"{x}_ids"]) for x in ("chosen", "rejected")
        )
        mean = a / len(pair["chosen_ids"]) - b / len(pair["rejected_ids"])
        smoothing = 1.0 - pair.get("label_confidence", 1.0)
        return pair["weight"] * self.formula(self.beta * (a - b), self.beta * mean, smoothing)

    def _logratio(self, prompt, answer):
        with torch.no_grad():
            reference = answer_logps(self.reference, prompt, answer)
        return answer_logps(self.model, prompt, answer) - reference


LAYOUTS = [{"layout": "shared"}, {"layout": "padded"}, {"max_tokens_per_microbatch": 1}]


@pytest.mark.parametrize(
    ("name", "options"),
    [("sigmoid", each) for each in LAYOUTS]
    + [("sigmoid_norm", {}), ("robust", {}), ("exo_pair", {"label_smoothing": 0.1})],
    ids=str,
)
def test_float64_training_is_a_textbook_loop(tmp_path, name, options):
    pairs = weighted_pairs()
    with float64_throughout():
        plain = PlainWeighted(FORMULAS[name], tiny_llama().double(), BETA, LEARNING_RATE)
        expected = np.asarray(plain.train(pairs, 4, 6, seed=3))
        named = {"loss_type": name, **options}
        trainer = make_trainer(tmp_path, tiny_llama().double(), pairs, options=named)
        got = np.asarray(train(trainer))
    assert np.ptp(expected[:, 0]) > 0.01
    np.testing.assert_allclose(got[:, 0], expected[:, 0], atol=1e-10, rtol=0)
    np.testing.assert_allclose(got[:, 1], expected[:, 1], rtol=1e-8)
    for ours, theirs in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


EVALUATED = ("loss", "rewards/margins", "rewards/accuracies")


@pytest.mark.parametrize("options", [{}, {"max_tokens_per_microbatch": 1}], ids=str)
def test_each_set_of_a_mixture_has_metrics_of_its_own(tmp_path, options):
    """A set's metrics are means over its own pairs, however these are spread over micro-batches."""
    sets = {"x/a.jsonl": weighted_pairs(7), "b": token_pairs(3, seed=8)}
    mixture = mix_preferences(sets, weights={"x/a.jsonl": 2.0, "b": 0.5})
    # One epoch in one log, in which the policy hardly moves.
    given = {"max_steps": 5, "logging_steps": 5, "learning_rate": 1e-20}
    with float64_throughout():
        model = tiny_llama().double()
        trainer = make_trainer(
            tmp_path,
            model,
            mixture,
            ref_model=tiny_llama(seed=1).double(),
            options=given | options | {"per_device_train_batch_size": 1},
            eval_dataset=mixture,
        )
        trainer.train()
        evaluation = trainer.evaluate()
        plain = PlainWeighted(sigmoid, model, BETA, LEARNING_RATE)
        plain.reference = tiny_llama(seed=1).double()
        expected = {}
        for name, factor in (("x/a.jsonl", 2.0), ("b", 0.5)):
            rows = [{"weight": 1.0} | row for row in sets[name]]
            margins = [BETA * naive_margin(model, plain.reference, row).item() for row in rows]
            short = {"x/a.jsonl": "a", "b": "b"}[name]
            losses = [factor * plain.loss(row).item() for row in rows]
            expected[f"loss/{short}"] = np.mean(losses)
            expected[f"rewards/margins/{short}"] = np.mean(margins)
            expected[f"rewards/accuracies/{short}"] = np.mean([margin > 0 for margin in margins])
    expected["loss"] = 0.7 * expected["loss/a"] + 0.3 * expected["loss/b"]
    (log,) = [log for log in trainer.state.log_history if "grad_norm" in log]
    for name, value in expected.items():
        assert evaluation[f"eval_{name}"] == pytest.approx(value, abs=1e-9), name
        assert log[name] == pytest.approx(value, abs=1e-9), name
    assert len([name for name in log if name.endswith(("/a", "/b"))]) == 2 * len(EVALUATED)


def test_metrics_of_ones_own_cannot_have_the_names_of_a_sets_metrics(tmp_path):
    mixture = mix_preferences({"a": token_pairs(4), "b": token_pairs(4, seed=8)})
    metrics = {"metrics_fn": lambda pairs: {"loss/a": pairs.lengths[:, 0]}}
    with pytest.raises(ConfigError, match="metrics_fn: the names loss/a are those of a dataset's"):
        make_trainer(tmp_path, pairs=mixture, **metrics).train()


def test_a_set_without_pairs_in_a_log_is_left_out_of_it(tmp_path):
    mixture = mix_preferences({"a": token_pairs(4), "b": token_pairs(4, seed=8)})
    options = {"train_sampling_strategy": "sequential", "max_steps": 2}
    trainer = make_trainer(tmp_path, pairs=mixture, options=options)
    train(trainer)
    first, second = [log for log in trainer.state.log_history if "grad_norm" in log]
    assert first["loss/a"] == pytest.approx(first["loss"])
    assert "loss/b" not in first
    assert second["loss/b"] == pytest.approx(second["loss"])
    assert "loss/a" not in second


def test_losses_of_an_evaluation_are_those_that_are_trained(tmp_path):
    seen = []

    def keep(prediction):
        seen.append(prediction.losses)
        return {}

    options = {"include_for_metrics": ["loss"]}
    trainer = make_trainer(
        tmp_path, options=options, eval_dataset=weighted_pairs(), compute_metrics=keep
    )
    loss = trainer.evaluate()["eval_loss"]
    assert seen[0].mean() == pytest.approx(loss, rel=1e-9)
    assert [value == 0.0 for value in seen[0]] == [n % 4 == 1 for n in range(10)]


def test_a_step_of_weight_0_trains_nothing_and_is_no_failure(tmp_path):
    weights = [0.0] * 4 + [1.0] * 4
    pairs = token_pairs(8).add_column("weight", weights)
    options = {"train_sampling_strategy": "sequential", "max_steps": 2}
    trainer = make_trainer(tmp_path, pairs=pairs, options=options)
    first, second = train(trainer)
    assert first == (0.0, 0.0)
    assert second[0] == pytest.approx(math.log(2))
    assert second[1] > 0


def test_a_resumed_run_has_the_same_weights_and_sums_of_sets(tmp_path):
    sets = {"a": weighted_pairs(6), "b": token_pairs(5, seed=8)}
    options = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 3}
    straight = make_trainer(tmp_path, pairs=mix_preferences(sets), options=options)
    straight.train()
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    resumed = make_trainer(tmp_path, pairs=mix_preferences(sets), options=options)
    resumed.train(resume_from_checkpoint=checkpoint)
    found, expected = (
        [
            {name: value for name, value in log.items() if not name.endswith("_per_second")}
            for log in trainer.state.log_history
            if "grad_norm" in log
        ]
        for trainer in (resumed, straight)
    )
    assert found == expected
    assert "loss/a" in found[0]
    for weights in ({"a": 1.0, "b": 0.5}, {"a": 1.0, "b": 1.0}):
        changed = mix_preferences(sets, weights=weights)
        other = make_trainer(tmp_path, pairs=changed, options=options)
        if weights["b"] == 1.0:  # the same weights, written otherwise
            other.train(resume_from_checkpoint=checkpoint)
        else:
            with pytest.raises(CheckpointError, match="\n  data: "):
                other.train(resume_from_checkpoint=checkpoint)


def stream(pairs):
    return datasets.IterableDataset.from_generator(lambda: iter(pairs.to_list()))


def test_a_stream_trains_as_a_dataset_and_notices_other_weights(tmp_path):
    options = {"train_sampling_strategy": "sequential", "save_strategy": "steps", "save_steps": 2}
    pairs = weighted_pairs(12)
    expected = train(make_trainer(tmp_path / "list", pairs=pairs, options=options))
    assert train(make_trainer(tmp_path, pairs=stream(pairs), options=options)) == expected
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    changed = pairs.remove_columns("weight").add_column("weight", [0.5] * 12)
    other = make_trainer(tmp_path, pairs=stream(changed), options=options)
    with pytest.raises(DataError, match="the stream gives other pairs than in the run that is res"):
        other.train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize(
    ("options", "confidences", "sentence"),
    [
        (
            {"loss_type": "hinge"},
            CONFIDENCES,
            "^train: label_confidence: the hinge loss has no smoothed form; remove the column, or "
            r"choose a loss_type that has one \(sigmoid, sigmoid_norm, robust, exo_pair, cpo, "
            r"simpo, alphapo\)",
        ),
        ({"loss_type": ["sigmoid", "ipo"]}, CONFIDENCES, "the ipo loss has no smoothed form"),
        (
            {"loss_type": "robust"},
            (0.9, 0.5, 0.8, 0.6),
            r"^train, row 1 \(counted from 0\): label_confidence is 0.5, but the robust loss needs "
            "one above 0.5; mend the 3 such values",
        ),
        (
            {"loss_type": "exo_pair", "label_smoothing": 0.1},
            (0.9, 0.5, 1.0, 0.0),
            r"^train, row 2 .* is 1, but the exo_pair loss needs one above 0 and below 1; mend the",
        ),
    ],
)
def test_refuses_confidences_that_the_loss_cannot_use(tmp_path, options, confidences, sentence):
    with pytest.raises(DataError, match=sentence):
        make_trainer(tmp_path, pairs=weighted_pairs(confidences=confidences), options=options)


def test_a_loss_of_the_users_own_takes_weights_but_no_confidences(tmp_path):
    def own(chosen, rejected, lengths):
        return -logsigmoid(BETA * (chosen - rejected))

    pairs = weighted_pairs(confidences=None)
    got = train(make_trainer(tmp_path / "own", pairs=pairs, loss_fn=own))
    np.testing.assert_allclose(got, train(make_trainer(tmp_path / "ours", pairs=pairs)), rtol=1e-5)
    with pytest.raises(DataError, match="label_confidence: loss_fn has no smoothed form"):
        make_trainer(tmp_path, pairs=weighted_pairs(), loss_fn=own)


def test_refuses_a_dataset_in_which_no_pair_counts(tmp_path):
    pairs = token_pairs(4).add_column("weight", [0.0] * 4)
    with pytest.raises(DataError, match="train: the weight of every pair is 0, so no pair counts"):
        make_trainer(tmp_path, pairs=pairs)


def test_the_log_says_which_weights_there_are(tmp_path, caplog):
    with caplog.at_level("INFO", logger="dpofast"):
        make_trainer(tmp_path, pairs=weighted_pairs())
    sentence = (
        "train: the pairs have weight from 0 to 3, mean 0.95; and label_confidence from 0.55 to "
        "0.9, mean 0.715."
    )
    assert caplog.text.count(sentence) == 1
