"""Metrics of the user's own are exact means over pairs, in the logs of training and evaluation."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from dpofast.errors import ConfigError
from tests.support import BETA, make_trainer, token_pairs, train


def own(pairs):
    logratios = pairs.chosen_logps - pairs.ref_chosen_logps
    margins = logratios - (pairs.rejected_logps - pairs.ref_rejected_logps)
    return {
        "margins": BETA * margins,
        "right": margins > 0,
        "kl/token": logratios / pairs.lengths[:, 0],
        "longer": pairs.lengths[:, 0] > pairs.lengths[:, 1],
    }


SAME = {
    "margins": "rewards/margins",
    "right": "rewards/accuracies",
    "kl/token": "logratios/chosen",
}


def test_they_are_logged_as_the_built_in_ones_are(tmp_path):
    options = {
        "max_steps": 2,
        "max_tokens_per_microbatch": 60,
        "per_device_eval_batch_size": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "best",
        "metric_for_best_model": "kl/token",
    }
    held_out = token_pairs(5, seed=4)
    trainer = make_trainer(tmp_path, options=options, metrics_fn=own, eval_dataset=held_out)
    train(trainer)
    logs = trainer.state.log_history
    for prefix, count in (("", 2), ("eval_", 2)):
        found = [log for log in logs if f"{prefix}rewards/margins" in log]
        assert len(found) == count
        for log in found:
            for name, same in SAME.items():
                assert log[f"{prefix}{name}"] == pytest.approx(log[f"{prefix}{same}"], rel=1e-12)
    longer = np.mean([len(p["chosen_ids"]) > len(p["rejected_ids"]) for p in held_out])
    assert found[0]["eval_longer"] == pytest.approx(longer)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["margins"] == logs[0]["margins"]
    assert trainer.state.best_model_checkpoint


def test_the_best_checkpoint_is_chosen_by_names_that_exist(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "kl/tokens"}
    trainer = make_trainer(
        tmp_path, options=options, metrics_fn=own, eval_dataset=token_pairs(2, seed=4)
    )
    with pytest.raises(ConfigError, match=r"^metric_for_best_model: .*eval_kl/token"):
        trainer.train()


REFUSED = {
    "number": (lambda p: {"a": 0.5}, "'a' is float for"),
    "mean": (lambda p: {"a": p.chosen_logps.mean()}, r"'a' is \[\] .* one value per pair"),
    "no dict": (lambda p: p.chosen_logps, "returned a Tensor, expected a dict"),
    "taken": (lambda p: {"loss": p.chosen_logps}, "the names loss are taken"),
    "reserved": (lambda p: {"eval_a": p.chosen_logps}, "the names eval_a are taken or reserved"),
    "coupled": (
        lambda p: {"a": p.chosen_logps - p.chosen_logps.mean()},
        "'a' of a pair depends on the other pairs",
    ),
    "error": (lambda p: {"a": p.margin}, "failed for 16 pairs .AttributeError: .*'margin'"),
    "no function": ({"a": 1}, "expected a function"),
}


@pytest.mark.parametrize(("function", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_metric_of_single_pairs_is_refused(tmp_path, function, message):
    with pytest.raises(ConfigError, match=f"^metrics_fn: .*{message}"):
        make_trainer(tmp_path, "no such model", metrics_fn=function, processing_class=None)


def test_names_that_change_later_are_refused(tmp_path):
    names = []

    def changing(pairs):
        return {name: torch.ones(len(pairs.lengths)) for name in ["a", *names]}

    trainer = make_trainer(tmp_path, metrics_fn=changing)
    names.append("b")
    with pytest.raises(ConfigError, match="returned a, b, but a at the start"):
        trainer.train()


def test_a_function_that_works_in_place_changes_nothing_else(tmp_path):
    def in_place(pairs):
        for logps in (pairs.chosen_logps, pairs.rejected_logps):
            logps.clamp_(max=-1000.0)
        for logps in (pairs.ref_chosen_logps, pairs.ref_rejected_logps):
            logps.clamp_(max=-1000.0)
        return {"least": pairs.chosen_logps}

    options = {"max_steps": 2}
    plain = make_trainer(tmp_path / "1", options=options)
    trainer = make_trainer(tmp_path, options=options, metrics_fn=in_place)
    held_out = token_pairs(5, seed=4)
    found, expected = (each.predict(held_out).predictions for each in (trainer, plain))
    np.testing.assert_array_equal(found, expected)
    assert train(trainer) == train(plain)
    assert trainer.state.log_history[0]["least"] == -1000.0
