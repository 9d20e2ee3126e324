"""compute_metrics and predict get log-probs and rewards of every pair, in the dataset's order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dpofast import DPOTrainer
from dpofast.errors import ConfigError
from dpofast.train.hooks.predictions import PairPredictions
from tests.support import BETA, answer_logps, make_trainer, tiny_llama, token_pairs, train

HELD_OUT = token_pairs(7, seed=4)
EVAL = {"per_device_eval_batch_size": 3, "max_tokens_per_microbatch": 40}


def expected_logps(model, pairs):
    with torch.no_grad():
        return np.array(
            [
                [answer_logps(model, p["prompt_ids"], p[f"{side}_ids"]) for side in SIDES]
                for p in pairs
            ]
        )


SIDES = ("chosen", "rejected")


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_every_pair_is_there_in_order(tmp_path, layout):
    trainer = make_trainer(
        tmp_path, tiny_llama(seed=1), ref_model=tiny_llama(), options={**EVAL, "layout": layout}
    )
    output = trainer.predict(HELD_OUT)
    found = output.predictions
    assert isinstance(found, PairPredictions)
    assert output.label_ids is None
    assert all(column.shape == (7,) and column.dtype == np.float64 for column in found)
    logps = expected_logps(tiny_llama(seed=1), HELD_OUT)
    ref_logps = expected_logps(tiny_llama(), HELD_OUT)
    for side, name in enumerate(SIDES):
        np.testing.assert_allclose(getattr(found, f"{name}_logps"), logps[:, side], rtol=1e-5)
        np.testing.assert_allclose(
            getattr(found, f"ref_{name}_logps"), ref_logps[:, side], rtol=1e-5
        )
        rewards = BETA * (logps - ref_logps)[:, side]
        np.testing.assert_allclose(getattr(found, f"{name}_rewards"), rewards, rtol=1e-3)
        lengths = [len(pair[f"{name}_ids"]) for pair in HELD_OUT]
        assert getattr(found, f"{name}_lengths").tolist() == lengths
    mean = np.mean(found.chosen_rewards - found.rejected_rewards)
    assert output.metrics["test_rewards/margins"] == pytest.approx(mean, rel=1e-9)


def test_compute_metrics_adds_to_the_evaluation_and_chooses_the_best(tmp_path):
    seen = []

    def best_of(prediction):
        seen.append(prediction)
        values = prediction.predictions
        margins = values.chosen_rewards - values.rejected_rewards
        return {"median": np.median(margins), "eval_own_worst": torch.tensor(margins.min())}

    options = {
        **EVAL,
        "max_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "best",
        "metric_for_best_model": "eval_own_median",
        "greater_is_better": True,
        "include_for_metrics": ["loss"],
    }
    sets = {"own": HELD_OUT, "other": token_pairs(2, seed=5)}
    trainer = make_trainer(tmp_path, options=options, eval_dataset=sets, compute_metrics=best_of)
    train(trainer)
    assert len(seen) == 4
    logs = [log for log in trainer.state.log_history if "eval_own_median" in log]
    medians = [log["eval_own_median"] for log in logs]
    assert len(medians) == 2
    assert trainer.state.best_metric == max(medians)
    assert isinstance(logs[0]["eval_own_worst"], float)
    assert seen[0].losses.shape == (7,)
    assert seen[0].losses.mean() == pytest.approx(logs[0]["eval_own_loss"], rel=1e-9)
    assert "eval_other_median" in trainer.evaluate()


def test_it_can_be_assigned_and_prediction_loss_only_leaves_it_out(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=HELD_OUT, options={"prediction_loss_only": True})
    trainer.compute_metrics = lambda prediction: {"pairs": len(prediction.predictions[0])}
    assert "eval_pairs" not in trainer.evaluate()
    assert trainer.predict(HELD_OUT).predictions is None
    trainer.args.prediction_loss_only = False
    assert trainer.evaluate()["eval_pairs"] == 7


def test_options_of_old_scripts_beside_the_config_leave_its_own_as_they_are(tmp_path, caplog):
    seen = []
    given = {"include_for_metrics": ["loss"], "prediction_loss_only": True}
    trainer = make_trainer(
        tmp_path, eval_dataset=HELD_OUT, compute_metrics=seen.append, options=given, max_length=99
    )
    assert "no effect" not in caplog.text  # they have one
    assert {name: getattr(trainer.args, name) for name in given} == given
    with pytest.raises(ConfigError, match="batch_eval_metrics isn't supported"):
        make_trainer(
            tmp_path, compute_metrics=len, options={"batch_eval_metrics": True}, max_length=99
        )


REFUSED = {
    "clash": (lambda p: {"loss": 0.0}, "the names eval_loss are measured already"),
    "no dict": (lambda p: 0.5, "returned a float, expected a dict"),
    "no name": (lambda p: {1: 0.5}, "returned a dict, expected a dict of names"),
    "a time": (lambda p: {"runtime": 0.5}, "the names eval_runtime are measured already"),
    "twice": (lambda p: {"own": 0.5, "eval_own": 1}, "own, eval_own are the same with the prefix"),
    "an array": (lambda p: {"own": np.arange(3)}, "'own' is a ndarray, which logs .* number"),
}


@pytest.mark.parametrize(("function", "message"), REFUSED.values(), ids=REFUSED)
def test_what_it_returns_is_checked(tmp_path, function, message):
    trainer = make_trainer(tmp_path, eval_dataset=HELD_OUT, compute_metrics=function)
    with pytest.raises(ConfigError, match=f"^compute_metrics: .*{message}"):
        trainer.evaluate()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_eval_metrics": True}, "^batch_eval_metrics isn't supported"),
        ({"eval_do_concat_batches": False}, "^eval_do_concat_batches: false isn't supported"),
        ({"include_for_metrics": ["inputs"]}, "^include_for_metrics: inputs aren't kept"),
    ],
)
def test_options_that_it_cannot_honour_are_refused(tmp_path, options, message):
    given = {"options": options, "processing_class": None}
    with pytest.raises(ConfigError, match=message):
        make_trainer(tmp_path, "no such model", compute_metrics=len, **given)


def test_what_is_no_function_and_a_hook_for_logits_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^compute_metrics: got 'accuracy', expected a function"):
        make_trainer(tmp_path, "no such model", compute_metrics="accuracy", processing_class=None)
    with pytest.raises(ConfigError, match="preprocess_logits_for_metrics"):
        make_trainer(tmp_path, preprocess_logits_for_metrics=len)


def test_log_probs_that_a_hook_leaves_out_are_missed(tmp_path):
    class Own(DPOTrainer):
        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            loss, *_ = super().prediction_step(model, inputs, True)
            return loss, None, None

    trainer = make_trainer(tmp_path, trainer_class=Own)
    with pytest.raises(
        ConfigError, match=r"^prediction_step: the log-probs of the pairs are missing"
    ):
        trainer.predict(HELD_OUT)


def test_a_loader_that_leaves_pairs_out_is_named(tmp_path):
    class Half(DPOTrainer):
        def get_eval_dataloader(self, eval_dataset=None):
            loader = super().get_eval_dataloader(eval_dataset)
            loader.batch_sampler.num_pairs = 6  # of 7
            return loader

    trainer = make_trainer(tmp_path, trainer_class=Half)
    with pytest.raises(ConfigError, match="pair 6 was evaluated 0 times"):
        trainer.predict(HELD_OUT)


def test_options_of_compute_metrics_are_not_called_without_effect(tmp_path, caplog):
    given = {"include_for_metrics": ["loss"], "prediction_loss_only": True}
    with caplog.at_level("WARNING", "dpofast"):
        trainer = make_trainer(tmp_path, options=given, eval_dataset=HELD_OUT)
    assert "no effect" not in caplog.text
    again = make_trainer(tmp_path, options=given, eval_dataset=HELD_OUT, max_length=99)
    assert again.args.include_for_metrics == trainer.args.include_for_metrics == ["loss"]
    assert again.args.prediction_loss_only
