"""A loss of the user's own trains through the trainer as a built-in one does."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from dpofast.errors import ConfigError
from tests.support import (
    BETA,
    float64_throughout,
    history,
    make_trainer,
    tiny_llama,
    token_pairs,
    train,
)


def sigmoid_by_hand(chosen_logratios, rejected_logratios, lengths):
    return torch.log1p(torch.exp(-BETA * (chosen_logratios - rejected_logratios)))


def ipo_by_hand(chosen_logratios, rejected_logratios, lengths):
    margins = chosen_logratios / lengths[:, 0] - rejected_logratios / lengths[:, 1]
    return (margins - 0.5 / BETA).square()


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_the_sigmoid_written_by_hand_trains_as_the_built_in(tmp_path, layout):
    options = {"layout": layout, "max_tokens_per_microbatch": 60, "max_steps": 3}
    runs = []
    with float64_throughout():
        for loss_fn in (None, sigmoid_by_hand):
            model = tiny_llama().double()
            trainer = make_trainer(tmp_path, model, options=options, loss_fn=loss_fn)
            train(trainer)
            runs.append((history(trainer), list(model.parameters())))
    (expected, weights), (got, own_weights) = runs
    assert abs(expected[-1][0] / math.log(2) - 1) > 1e-3  # the policy has moved
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    for own, weight in zip(own_weights, weights, strict=True):
        torch.testing.assert_close(own, weight, rtol=1e-9, atol=1e-11)


def test_it_is_evaluated_saved_resumed_and_reported(tmp_path):
    saving = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    held_out = token_pairs(4, seed=4)
    options = {**saving, "loss_type": "ipo"}
    built_in = make_trainer(tmp_path / "1", options=options, eval_dataset=held_out)
    trainer = make_trainer(tmp_path, options=saving, loss_fn=ipo_by_hand, eval_dataset=held_out)
    np.testing.assert_allclose(train(trainer), train(built_in), rtol=1e-5)
    before, after = trainer.evaluate(), built_in.evaluate()
    assert before["eval_loss"] == pytest.approx(after["eval_loss"], rel=1e-5)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["loss"] == f"CustomLoss(beta={BETA}, function=ipo_by_hand)"
    assert summary["first_loss"] == pytest.approx(built_in.first_loss, rel=1e-5)
    resumed = make_trainer(tmp_path, options=saving, loss_fn=ipo_by_hand)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert history(resumed) == history(trainer)


def test_beta_is_the_factor_of_the_rewards(tmp_path):
    logs = []
    for beta in (0.1, 0.2):
        trainer = make_trainer(
            tmp_path, options={"beta": beta, "max_steps": 2}, loss_fn=sigmoid_by_hand
        )
        train(trainer)
        logs.append(trainer.state.log_history[1])
    assert logs[0]["loss"] == logs[1]["loss"]
    margins = [log["rewards/margins"] for log in logs]
    assert margins[0]
    assert margins[1] == pytest.approx(2 * margins[0])


class TestRefused:
    def test_a_loss_of_whole_batches(self, tmp_path):
        sentence = r"^loss_fn: it couples pairs: .* CoupledFunction\(function\): .* at a time\.$"
        with pytest.raises(ConfigError, match=sentence):
            make_trainer(tmp_path, loss_fn=lambda c, r, n: c - r - (c - r).mean())

    def test_what_is_no_function(self, tmp_path):
        with pytest.raises(ConfigError, match=r"^loss_fn: function is 'hinge', expected"):
            make_trainer(tmp_path, loss_fn="hinge")

    def test_a_loss_type_as_well(self, tmp_path):
        with pytest.raises(ConfigError, match=r"^loss_fn: loss_type is \['ipo'\], too"):
            make_trainer(tmp_path, options={"loss_type": "ipo"}, loss_fn=sigmoid_by_hand)

    @pytest.mark.parametrize(
        ("name", "value"), [("loss_weights", [0.5]), ("f_divergence_type", "forward_kl")]
    )
    def test_what_only_losses_of_loss_type_have(self, tmp_path, name, value):
        with pytest.raises(ConfigError, match=rf"^loss_fn: {name} is .*; leave it out"):
            make_trainer(tmp_path, options={name: value}, loss_fn=sigmoid_by_hand)

    def test_label_smoothing_as_well(self, tmp_path):
        with pytest.raises(ConfigError, match=r"^loss_fn: label_smoothing is 0\.1"):
            make_trainer(tmp_path, options={"label_smoothing": 0.1}, loss_fn=sigmoid_by_hand)

    def test_it_is_refused_before_anything_is_loaded(self, tmp_path):
        with pytest.raises(ConfigError, match=r"^loss_fn: "):
            make_trainer(tmp_path, "no such model", loss_fn=len, processing_class=None)


def test_the_default_loss_type_given_by_name_is_no_contradiction(tmp_path):
    trainer = make_trainer(tmp_path, options={"loss_type": "sigmoid"}, loss_fn=sigmoid_by_hand)
    assert trainer.loss_types == ["custom"]


def test_what_it_returns_later_is_checked_too(tmp_path):
    is_mean = []

    def later(chosen_logratios, rejected_logratios, lengths):
        losses = sigmoid_by_hand(chosen_logratios, rejected_logratios, lengths)
        return losses.mean() if is_mean else losses

    trainer = make_trainer(tmp_path, loss_fn=later)
    assert trainer.loss_fn is later
    is_mean.append(True)
    with pytest.raises(ConfigError, match=r"^loss_fn: it returned \[\] torch.float64 for . pairs"):
        trainer.train()
