"""A beta that moves: as a textbook loop with that beta, resumed bit for bit, and reported."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from dpofast import DPOTrainer
from dpofast.errors import CheckpointError, ConfigError
from dpofast_kernels import make_loss
from tests.support import (
    BETA,
    LEARNING_RATE,
    PlainDPO,
    answer_logps,
    float64_throughout,
    history,
    make_trainer,
    tiny_llama,
    token_pairs,
    train,
)

END, TARGET, GAIN = 0.1 * BETA, 0.1, 0.9
SCHEDULE = {"beta_schedule": "cosine", "beta_end": END}
CONTROL = {"target_kl": TARGET, "target_kl_gain": GAIN}
MOVES = {"schedule": SCHEDULE, "controller": CONTROL}
NOTED = ("beta", "kl", "kl/absolute", "rewards/margins")


class PlainMoving(PlainDPO):
    """The textbook loop with a moving beta; notes the metrics NOTED of each step."""

    def __init__(self, kind, *args):
        super().__init__(*args)
        self.kind, self.noted = kind, []

    def step(self, pairs):
        if self.kind == "schedule":
            share = len(self.noted) / 5  # of six steps
            self.beta = END + (BETA - END) * (1 + math.cos(math.pi * share)) / 2
        kl, drift, margin = self._distances(pairs)
        self.noted.append((self.beta, kl, drift, self.beta * margin))
        result = super().step(pairs)
        if self.kind == "controller":
            self.beta *= 1 + GAIN * min(max(drift / TARGET - 1, -0.2), 0.2)
        return result

    def _distances(self, pairs):
        """Per token: the mean log-ratio, and that of absolute values; the mean margin of a pair."""
        ratios, tokens = [], 0
        for pair in pairs:
            for answer in (pair["chosen_ids"], pair["rejected_ids"]):
                with torch.no_grad():
                    models = (self.model, self.reference)
                    logps = [answer_logps(m, pair["prompt_ids"], answer).item() for m in models]
                ratios.append(logps[0] - logps[1])
                tokens += len(answer)
        margin = sum(ratios[0::2]) - sum(ratios[1::2])
        return sum(ratios) / tokens, sum(map(abs, ratios)) / tokens, margin / len(pairs)


@pytest.mark.parametrize("layout", ["shared", "padded"])
@pytest.mark.parametrize("kind", MOVES)
@pytest.mark.slow
def test_float64_training_is_a_textbook_loop_with_that_beta(tmp_path, kind, layout):
    pairs = token_pairs(10)
    options = {**MOVES[kind], "layout": layout, "max_tokens_per_microbatch": 60}
    with float64_throughout():
        plain = PlainMoving(kind, tiny_llama().double(), BETA, LEARNING_RATE)
        expected = np.asarray(plain.train(pairs, 4, 6, seed=3))
        trainer = make_trainer(tmp_path, tiny_llama().double(), pairs, options=options)
        got = np.asarray(train(trainer))
    np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-9)
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    noted = [[log[name] for name in NOTED] for log in logs]
    np.testing.assert_allclose(noted, plain.noted, rtol=1e-7, atol=1e-10)
    betas = [beta for beta, *_ in noted]
    assert betas[0] == BETA
    if kind == "controller":  # the first steps are near the reference, the last ones far from it
        assert betas[1] < betas[0]
        assert betas[-1] > min(betas)
    for ours, theirs in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", MOVES)
def test_a_resumed_run_has_the_same_betas_bit_for_bit(tmp_path, kind):
    options = {**MOVES[kind], "save_strategy": "steps", "save_steps": 1, "logging_steps": 2}

    def betas(trainer):
        return [log["beta"] for log in trainer.state.log_history if "beta" in log]

    straight = make_trainer(tmp_path, options=options)
    expected = train(straight), betas(straight)
    assert len(set(expected[1])) == 3
    resumed = make_trainer(tmp_path, options=options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert (history(resumed), betas(resumed)) == expected
    other = make_trainer(tmp_path, options={**options, **OTHER[kind]})
    with pytest.raises(CheckpointError, match=f"{next(iter(MOVES[kind]))}: .* in the checkpoint"):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))


OTHER = {
    "schedule": {"beta_schedule": "constant", "beta_end": None},
    "controller": {"target_kl": 0.3},
}


def test_every_call_of_train_begins_with_the_first_beta(tmp_path):
    trainer = make_trainer(tmp_path, options={**CONTROL, "max_steps": 2})
    for _ in range(2):
        trainer.train()
        betas = [log["beta"] for log in trainer.state.log_history if "beta" in log]
        assert betas[0] == BETA != betas[1]


def test_evaluations_keep_the_beta_of_the_options(tmp_path):
    """So that the loss of the same weights on the same pairs is the same at any step."""
    held_out = token_pairs(4, seed=4)
    options = {**SCHEDULE, "learning_rate": 0.0, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"max_steps": 4, "metric_for_best_model": "kl"}  # which evaluations have
    reference = tiny_llama(seed=5)
    given = {"ref_model": reference, "eval_dataset": held_out}
    trainer = make_trainer(tmp_path, options=options, **given)
    trainer.train()
    logs = trainer.state.log_history
    losses = {log["eval_loss"] for log in logs if "eval_loss" in log}
    assert losses == {trainer.evaluate()["eval_loss"]}
    still = make_trainer(tmp_path / "2", **given)
    assert losses == {still.evaluate()["eval_loss"]}
    assert not any("beta" in log for log in logs if "eval_loss" in log)
    assert trainer.beta == BETA


def test_a_constant_beta_is_not_logged_and_kl_is_measured_in_evaluations(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=token_pairs(4, seed=4))
    trainer.train()
    log = next(log for log in reversed(trainer.state.log_history) if "grad_norm" in log)
    assert "beta" not in log
    assert 0.0 < abs(log["kl"]) <= log["kl/absolute"]
    metrics = trainer.evaluate()
    assert 0.0 < abs(metrics["eval_kl"]) <= metrics["eval_kl/absolute"]


@pytest.mark.parametrize(
    ("kind", "option"), [("schedule", "beta_schedule"), ("controller", "target_kl")]
)
def test_a_loss_with_a_beta_of_its_own_is_refused(tmp_path, kind, option):
    trainer = make_trainer(tmp_path, options=MOVES[kind])
    trainer.pair_loss = make_loss("ipo", beta=0.7)
    with pytest.raises(ConfigError, match=rf"pair_loss: its beta is 0.7, but {option} moves beta"):
        trainer.train()
    trainer.pair_loss = make_loss("ipo", beta=BETA)
    trainer.train()
    assert len({log["beta"] for log in trainer.state.log_history if "beta" in log}) > 2


class OwnLoss(DPOTrainer):
    """Trains something that no pass of ours computes."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return 1e-3 * sum(p.square().sum() for p in model.parameters())


def test_a_target_that_nothing_measures_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, options=CONTROL, trainer_class=OwnLoss)
    with pytest.raises(ConfigError, match=r"^target_kl: no pass of step 1 has measured the drift"):
        trainer.train()


@pytest.mark.parametrize("kind", MOVES)
def test_a_loss_fn_has_no_beta_to_move(tmp_path, kind):
    name = next(iter(MOVES[kind]))
    with pytest.raises(ConfigError, match=f"^loss_fn: {name} is .* only losses of loss_type have"):
        make_trainer(tmp_path, options=MOVES[kind], loss_fn=lambda a, b, n: (a - b).square())


def test_the_summary_and_the_card_say_how_beta_moves(tmp_path):
    trainer = make_trainer(tmp_path, options=SCHEDULE)
    trainer.train()
    words = f"cosine, from {BETA:g} to {END:g} over the run"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["beta_schedule"] == words
    trainer.create_model_card()
    assert words in (tmp_path / "run" / "README.md").read_text()
