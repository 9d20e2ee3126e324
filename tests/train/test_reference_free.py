"""Losses without a reference, and likelihood terms, train as a textbook loop in fp64."""

from __future__ import annotations

import dataclasses
import json
import logging

import numpy as np
import pytest
import torch

from dpofast import CPOConfig, CPOTrainer, DPOConfig, DPOTrainer, ORPOConfig, ORPOTrainer
from dpofast.data import mix_preferences
from dpofast.errors import CheckpointError, ConfigError, DataError
from dpofast.options.loss_fields import loss_facts
from dpofast_kernels import make_loss
from tests.kernels.preference.formulas import plain_formula
from tests.support import (
    BETA,
    LEARNING_RATE,
    PlainDPO,
    answer_logps,
    byte_tokenizer,
    clip_exactly,
    float64_throughout,
    make_trainer,
    tiny_llama,
    token_pairs,
    train,
)

# Options, the formula of a pair's loss, and the weights of the likelihood of chosen answers and of
# whole chosen sequences.
CASES = {
    "sft": ({"loss_type": "sft"}, None, (1.0, 0.0)),
    "dpo and sft": (
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.9, 0.2]},
        (0.9, "sigmoid", {}),
        (0.2, 0.0),
    ),
    "cpo": ({"loss_type": "cpo"}, (1.0, "cpo", {}), (1.0, 0.0)),
    "simpo": (
        {"loss_type": "simpo", "simpo_gamma": 0.3, "label_smoothing": 0.1},
        (1.0, "simpo", {"simpo_gamma": 0.3, "label_smoothing": 0.1}),
        (0.0, 0.0),
    ),
    "alphapo": (
        {"loss_type": "alphapo", "alpha": 0.25, "cpo_alpha": 0.5},
        (1.0, "alphapo", {"alpha": 0.25}),
        (0.5, 0.0),
    ),
    "orpo": ({"loss_type": "orpo"}, (1.0, "orpo", {}), (0.0, 1.0)),
    "orpo and sft": (
        {"loss_type": ["orpo", "sft"], "loss_weights": [2.0, 0.5]},
        (2.0, "orpo", {}),
        (0.5, 2.0),
    ),
}
LAYOUTS = [
    {"layout": "shared"},
    pytest.param({"layout": "unshared"}, marks=pytest.mark.slow),
    pytest.param({"layout": "padded"}, marks=pytest.mark.slow),
    # long pairs, and several micro-batches
    pytest.param({"max_tokens_per_microbatch": 1}, marks=pytest.mark.slow),
]


class PlainLikelihood(PlainDPO):
    """The textbook loop with a pair loss, and means over the tokens of the whole step."""

    def __init__(self, formula, likelihood, has_reference, *args):
        super().__init__(*args)
        self.formula, self.likelihood, self.has_reference = formula, likelihood, has_reference

    def step(self, pairs):
        self.model.train()
        total = torch.zeros(())
        answers = sum(len(pair["chosen_ids"]) for pair in pairs)
        prompts = sum(len(pair["prompt_ids"]) - 1 for pair in pairs)
        of_answers, of_sequences = self.likelihood
        for pair in pairs:
            total = total + self._pair_loss(pair) / len(pairs)
            chosen = answer_logps(self.model, pair["prompt_ids"], pair["chosen_ids"])
            total = total - of_answers * chosen / answers
            whole = answer_logps(
                self.model, pair["prompt_ids"][:1], [*pair["prompt_ids"][1:], *pair["chosen_ids"]]
            )
            total = total - of_sequences * whole / (answers + prompts)
        total.backward()
        norm = clip_exactly(self.model.parameters(), self.max_norm).item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total.item(), norm

    def _pair_loss(self, pair):
        if self.formula is None:
            return torch.zeros(())
        weight, name, options = self.formula
        loss = make_loss(name, BETA, **options)
        logps = []
        for answer in (pair["chosen_ids"], pair["rejected_ids"]):
            logp = answer_logps(self.model, pair["prompt_ids"], answer)
            if self.has_reference:
                with torch.no_grad():
                    reference = answer_logps(self.reference, pair["prompt_ids"], answer)
                logp = logp - reference
            logps.append(logp.view(1))
        lengths = torch.tensor([[len(pair["chosen_ids"]), len(pair["rejected_ids"])]])
        return weight * plain_formula(loss, *logps, lengths).sum()


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_float64_training_is_a_textbook_loop(tmp_path, case, options):
    named, formula, likelihood = CASES[case]
    pairs = token_pairs(10)
    with float64_throughout():
        arguments = (formula, likelihood, case == "dpo and sft")
        plain = PlainLikelihood(*arguments, tiny_llama().double(), BETA, LEARNING_RATE)
        expected = np.asarray(plain.train(pairs, 4, 6, seed=3))
        trainer = make_trainer(tmp_path, tiny_llama().double(), pairs, options=named | options)
        got = np.asarray(train(trainer))
    assert abs(expected[-1, 0] / expected[0, 0] - 1) > 0.01  # it learns
    np.testing.assert_allclose(got[:, 0], expected[:, 0], atol=1e-9, rtol=0)
    np.testing.assert_allclose(got[:, 1], expected[:, 1], rtol=1e-8)
    for ours, theirs in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)


def test_a_prompt_of_one_token_has_nothing_to_score(tmp_path):
    pairs = token_pairs(8)
    short = pairs.map(lambda row, index: {"prompt_ids": row["prompt_ids"][: 1 + index % 2]}, True)
    with float64_throughout():
        plain = PlainLikelihood(
            *((1.0, "orpo", {}), (0.0, 1.0), False, tiny_llama().double(), BETA, LEARNING_RATE)
        )
        expected = np.asarray(plain.train(short, 4, 6, seed=3))
        trainer = make_trainer(
            tmp_path, tiny_llama().double(), short, options={"loss_type": "orpo"}
        )
        got = np.asarray(train(trainer))
    np.testing.assert_allclose(got, expected, atol=1e-8)


@pytest.mark.parametrize("loss_type", ["sft", "simpo", "orpo"])
def test_no_reference_pass_and_no_store(tmp_path, loss_type, caplog):
    """Neither the given reference nor the store is touched, and one line says so."""
    pairs = token_pairs(8)
    reference = tiny_llama(seed=1)
    reference.forward = None  # a call fails
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(
            tmp_path,
            tiny_llama(),
            pairs,
            options={"loss_type": loss_type, "max_steps": 2},
            ref_model=reference,
            eval_dataset=token_pairs(4, seed=1),
        )
    assert (
        f"The loss {loss_type} has no reference, so these aren't used: ref_model, " in caplog.text
    )
    assert trainer.ref_model is None
    trainer.train()
    trainer.evaluate()
    assert not (tmp_path / "store").exists()
    summary = trainer.reference.store.totals()
    assert summary is None  # nothing was needed, found or scored
    assert "step 0" not in caplog.text


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_an_evaluation_takes_its_means_over_the_whole_set(tmp_path, batch_size):
    pairs, held_out = token_pairs(4), token_pairs(7, seed=5)
    with float64_throughout():
        model = tiny_llama().double()
        trainer = make_trainer(
            tmp_path,
            model,
            pairs,
            options={"loss_type": ["orpo", "sft"], "per_device_eval_batch_size": batch_size},
            eval_dataset=held_out,
        )
        found = trainer.evaluate()
        with torch.no_grad():
            plain = PlainLikelihood((1.0, "orpo", {}), (1.0, 1.0), False, model, BETA, 1.0)
            answers = sum(len(pair["chosen_ids"]) for pair in held_out)
            prompts = sum(len(pair["prompt_ids"]) - 1 for pair in held_out)
            loss = np.mean([plain._pair_loss(pair).item() for pair in held_out])
            chosen = [
                answer_logps(model, pair["prompt_ids"], pair["chosen_ids"]).item()
                for pair in held_out
            ]
            whole = [
                answer_logps(
                    model, pair["prompt_ids"][:1], [*pair["prompt_ids"][1:], *pair["chosen_ids"]]
                ).item()
                for pair in held_out
            ]
    of_answers, of_sequences = -sum(chosen) / answers, -sum(whole) / (answers + prompts)
    assert found["eval_loss"] == pytest.approx(loss + of_answers + of_sequences, abs=1e-10)
    assert found["eval_nll_loss"] == pytest.approx((of_answers + of_sequences) / 2, abs=1e-10)


def test_weights_of_pairs_count_in_the_likelihood(tmp_path):
    pairs = token_pairs(8).add_column("weight", [0.0, 2.0] * 4)
    with float64_throughout():
        model = tiny_llama().double()
        trainer = make_trainer(
            tmp_path, model, pairs, options={"loss_type": "sft"}, eval_dataset=pairs
        )
        found = trainer.evaluate()
        with torch.no_grad():
            total = sum(
                row["weight"] * answer_logps(model, row["prompt_ids"], row["chosen_ids"]).item()
                for row in pairs
            )
    tokens = sum(len(row["chosen_ids"]) for row in pairs)
    assert found["eval_loss"] == pytest.approx(-total / tokens, abs=1e-10)


class TestTrainersOfTRL:
    """CPOTrainer and ORPOTrainer are thin names: the same numbers as DPOTrainer's."""

    def losses(self, tmp_path, kind, config, **options):
        arguments = {"output_dir": str(tmp_path / "run"), "max_steps": 3, "logging_steps": 1}
        arguments |= {"report_to": "none", "learning_rate": LEARNING_RATE, "bf16": False}
        trainer = kind(
            tiny_llama(),
            args=config(**arguments, **options),
            train_dataset=token_pairs(8),
            processing_class=byte_tokenizer(),
        )
        trainer.train()
        return [log["loss"] for log in trainer.state.log_history if "loss" in log]

    @pytest.mark.parametrize(
        ("given", "same"),
        [
            ({}, {"loss_type": "cpo"}),
            ({"loss_type": "hinge"}, {"loss_type": "cpo_hinge"}),
            ({"loss_type": "ipo", "cpo_alpha": 0.0}, {"loss_type": "cpo_ipo", "cpo_alpha": 0.0}),
            ({"loss_type": "simpo"}, {"loss_type": "simpo", "cpo_alpha": 1.0}),
            (
                {"loss_type": "simpo", "alpha": 0.2, "cpo_alpha": 0.0},
                {"loss_type": "alphapo", "alpha": 0.2},
            ),
        ],
        ids=str,
    )
    def test_cpo(self, tmp_path, given, same):
        ours = self.losses(tmp_path / "cpo", CPOTrainer, CPOConfig, **given)
        assert ours == self.losses(tmp_path / "dpo", DPOTrainer, DPOConfig, **same)

    def test_orpo(self, tmp_path):
        ours = self.losses(tmp_path / "orpo", ORPOTrainer, ORPOConfig)
        assert ours == self.losses(tmp_path / "dpo", DPOTrainer, DPOConfig, loss_type="orpo")

    def test_a_config_is_settled_once(self, tmp_path):
        config = CPOConfig(output_dir=str(tmp_path), loss_type="hinge")
        assert config.loss_type == ["cpo_hinge"]
        assert dataclasses.replace(config, beta=0.3).loss_type == ["cpo_hinge"]

    @pytest.mark.parametrize(
        ("kind", "options", "message"),
        [
            (
                CPOConfig,
                {"loss_type": "kto_pair"},
                "Unknown loss 'kto_pair'. .* These are CPOTrainer's",
            ),
            (CPOConfig, {"alpha": 0.1}, "alpha: AlphaPO bends the rewards of simpo"),
            (CPOConfig, {"cpo_alpha": -1.0}, "cpo_alpha: got -1.0, expected a finite number of"),
            (ORPOConfig, {"loss_type": "sigmoid"}, "ORPOTrainer trains the loss orpo only"),
        ],
    )
    def test_wrong_options(self, tmp_path, kind, options, message):
        with pytest.raises(ConfigError, match=message):
            kind(output_dir=str(tmp_path), **options)

    def test_a_config_of_another_trainer_is_refused(self, tmp_path):
        with pytest.raises(ConfigError, match=r"got a DPOConfig, expected a dpofast\.CPOConfig"):
            CPOTrainer(tiny_llama(), args=DPOConfig(output_dir=str(tmp_path)))


def test_a_loss_with_another_need_of_a_reference_cannot_be_assigned(tmp_path):
    trainer = make_trainer(tmp_path, tiny_llama(), token_pairs(8))
    trainer.pair_loss = make_loss("simpo")
    with pytest.raises(ConfigError, match="only one of this loss and that of the options has a"):
        trainer.train()


def test_an_assigned_loss_does_not_keep_the_likelihood_of_the_options(tmp_path):
    trainer = make_trainer(
        tmp_path, tiny_llama(), token_pairs(8), options={"loss_type": ["cpo", "sft"]}
    )
    trainer.pair_loss = make_loss("simpo")
    with pytest.raises(ConfigError, match="has a likelihood term, which no assigned loss replaces"):
        trainer.train()


@pytest.mark.parametrize("loss_type", ["sft", "orpo", "cpo"])
def test_losses_of_datasets_contain_the_likelihood(tmp_path, loss_type):
    pairs = mix_preferences({"a": token_pairs(5), "b": token_pairs(4, seed=2)})
    trainer = make_trainer(
        *(tmp_path, tiny_llama(), pairs), options={"loss_type": loss_type}, eval_dataset=pairs
    )
    found = trainer.evaluate()
    mean = (5 * found["eval_loss/a"] + 4 * found["eval_loss/b"]) / 9
    assert mean == pytest.approx(found["eval_loss"], rel=1e-6)
    assert found["eval_loss/a"] != pytest.approx(found["eval_loss/b"], rel=1e-4)


@pytest.mark.parametrize("weights", [None, [0.5], [2.0, 1.0]])
def test_rewards_are_the_same_in_logs_predictions_and_mixtures(tmp_path, weights):
    """A loss of means per token has rewards per token, whatever its weight."""
    loss_type = ["simpo"] if weights is None or len(weights) == 1 else ["simpo", "cpo_ipo"]
    options = {"loss_type": loss_type, "loss_weights": weights}
    trainer = make_trainer(tmp_path, tiny_llama(), token_pairs(8), options=options)
    found = trainer.predict(token_pairs(6, seed=3))
    rewards, lengths = found.predictions.chosen_rewards, found.predictions.chosen_lengths
    assert rewards == pytest.approx(BETA * found.predictions.chosen_logps / lengths)
    assert found.metrics["test_rewards/chosen"] == pytest.approx(rewards.mean())


def test_losses_of_single_pairs_are_refused_with_a_likelihood(tmp_path):
    with pytest.raises(ConfigError, match="the likelihood term of the loss is a mean over all"):
        make_trainer(
            *(tmp_path, tiny_llama(), token_pairs(8)),
            options={"loss_type": ["sigmoid", "sft"], "include_for_metrics": ["loss"]},
            compute_metrics=lambda prediction: {},
        )


def test_a_weight_of_zero_leaves_the_likelihood_only(tmp_path):
    losses = []
    for name, options in (
        ("sft", {"loss_type": "sft"}),
        ("zero", {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.0, 1.0]}),
    ):
        trainer = make_trainer(tmp_path / name, tiny_llama(), token_pairs(8), options=options)
        losses.append([loss for loss, _ in train(trainer)])
    assert losses[0] == losses[1]


def test_a_run_without_a_reference_does_not_go_on_with_one(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(
        tmp_path, tiny_llama(), token_pairs(8), options={**options, "loss_type": "simpo"}
    )
    trainer.train()
    changed = ["loss_type", "simpo_gamma", "cpo_alpha"]
    resumed = make_trainer(
        tmp_path, tiny_llama(), token_pairs(8), options={**options, "allow_changed": changed}
    )
    with pytest.raises(CheckpointError, match="was trained without a reference, so a run with one"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


def test_the_likelihood_of_each_loss_is_a_fact_of_the_run(tmp_path):
    configs = [
        CPOConfig(str(tmp_path), loss_type=["sigmoid", "simpo"], cpo_alpha=alpha)
        for alpha in (None, 1.0)
    ]
    first, second = (loss_facts(config) for config in configs)
    assert first["cpo_alpha"] == {"cpo": 1.0, "simpo": 0.0}
    assert second["cpo_alpha"] == {"cpo": 1.0, "simpo": 1.0}


def test_the_card_and_the_summary_name_the_method(tmp_path):
    trainer = make_trainer(
        tmp_path, tiny_llama(), token_pairs(8), options={"loss_type": "orpo", "max_steps": 2}
    )
    trainer.train()
    trainer.save_model()
    text = (tmp_path / "run" / "README.md").read_text()
    assert "by [ORPO](https://huggingface.co/papers/2403.07691) with dpofast" in text
    assert "negative log-likelihood per token" in text
    assert "Rafailov" not in text
    assert "\n- dpo\n" not in text
    assert "over its probability under the reference" not in text
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["loss_type"] == ["orpo"]
    assert summary["likelihood"] == {"answers": 0.0, "sequences": 1.0}
    assert summary["reference_store"] is None


def test_soft_labels_are_refused_by_name(tmp_path):
    pairs = token_pairs(8).add_column("label_confidence", [0.9] * 8)
    with pytest.raises(DataError, match="label_confidence: the sft loss has no smoothed form"):
        make_trainer(tmp_path, tiny_llama(), pairs, options={"loss_type": "sft"})


@pytest.mark.parametrize("loss_type", [None, 3, [["sigmoid"]]])
def test_a_loss_type_of_another_type(tmp_path, loss_type):
    with pytest.raises(ConfigError, match=r"loss_type: got .*, expected a name or a list"):
        CPOConfig(str(tmp_path), loss_type=loss_type)
