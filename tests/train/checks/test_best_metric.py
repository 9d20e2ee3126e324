"""A metric that no evaluation has is found before the first step."""

from __future__ import annotations

import pytest
from transformers import TrainerCallback

from dpofast.data import mix_preferences
from dpofast.errors import ConfigError
from tests.support import make_trainer, tiny_mixtral, token_pairs, train

BEST = {
    "max_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
}


def trainer_for(folder, metric, sets=None, **given):
    options = {**BEST, **given.pop("options", {})}
    if metric is not None:
        options["metric_for_best_model"] = metric
    held_out = token_pairs(4, seed=4)
    eval_dataset = held_out if sets is None else dict.fromkeys(sets, held_out)
    return make_trainer(folder, options=options, eval_dataset=eval_dataset, **given)


@pytest.mark.parametrize(
    ("metric", "sets"),
    [("accuracy", None), ("eval_rewards", None), (None, ["a", "b"]), ("eval_c_loss", ["a", "b"])],
)
def test_an_unknown_metric_is_refused_with_those_that_exist(tmp_path, metric, sets):
    trainer = trainer_for(tmp_path, metric, sets)
    first = "eval_loss" if sets is None else "eval_a_loss"
    with pytest.raises(ConfigError, match=f"^metric_for_best_model: .* among {first}, "):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("metric", "sets"),
    [(None, None), ("rewards/margins", None), ("eval_runtime", None), ("b_loss", ["a", "b"])],
)
def test_a_metric_that_exists_chooses_the_best_checkpoint(tmp_path, metric, sets):
    trainer = trainer_for(tmp_path, metric, sets)
    train(trainer)
    assert trainer.state.best_model_checkpoint


def test_the_metrics_of_each_set_of_a_mixture_exist(tmp_path):
    held_out = mix_preferences({"a": token_pairs(2), "org/b": token_pairs(2, seed=4)})
    options = {**BEST, "metric_for_best_model": "loss/b"}
    trainer = make_trainer(tmp_path, options=options, eval_dataset=held_out)
    train(trainer)
    assert trainer.state.best_metric in [
        log["eval_loss/b"] for log in trainer.state.log_history if "eval_loss/b" in log
    ]


def test_the_auxiliary_loss_of_a_mixture_is_measured(tmp_path):
    mixture = tiny_mixtral(output_router_logits=True, router_aux_loss_coef=0.1)
    train(trainer_for(tmp_path, "aux_loss", model=mixture))


def test_every_evaluation_while_training_reads_it(tmp_path):
    options = {"save_strategy": "no", "load_best_model_at_end": False}
    with pytest.raises(ConfigError, match=r"^metric_for_best_model: "):
        trainer_for(tmp_path, "accuracy", options=options).train()
    train(trainer_for(tmp_path, "accuracy", options={**options, "eval_strategy": "no"}))


def test_a_callback_may_add_the_metric(tmp_path):
    class AddsAccuracy(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            metrics["eval_accuracy"] = 0.5

    trainer = trainer_for(tmp_path, "accuracy", callbacks=[AddsAccuracy()])
    train(trainer)
    assert trainer.state.best_metric == 0.5
