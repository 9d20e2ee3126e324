"""WPO: pairs are weighted by the policy's own probabilities, in training and in evaluation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dpofast.data import mix_preferences
from dpofast.errors import CheckpointError, ConfigError, ModelError
from dpofast_kernels import CoupledFunction, make_coupled_loss
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
from tests.train.test_pair_weights import weighted_pairs

SIDES = ("chosen", "rejected")


def plain_weight(model, pair, clamp=None):
    """w_w w_l by equation 2 of WPO's paper, from all logits of the two sequences."""
    total = 0.0
    for side in SIDES:
        prompt, answer = pair["prompt_ids"], pair[f"{side}_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits
        p = logits[0, len(prompt) - 1 : -1].softmax(-1)  # [n, V]
        taken = p.gather(-1, torch.tensor(answer)[:, None])[:, 0]
        total = total + (taken.log() - p.square().sum(-1).log()).mean()
    weight = total.exp()
    return weight if clamp is None else weight.clamp(max=clamp)


def sharp_llama(seed=0):
    """Logits of a wide spread, so that the weights of pairs differ."""
    model = tiny_llama(seed).double()
    with torch.no_grad():
        model.lm_head.weight.mul_(6.0)
    return model


class PlainWPO(PlainDPO):
    """The textbook loop; each pair may have a weight of its own, too."""

    def __init__(self, *args, clamp=None):
        super().__init__(*args)
        self.clamp = clamp

    def loss(self, pair):
        margin = naive_margin(self.model, self.reference, pair)
        weight = plain_weight(self.model, pair, self.clamp) * pair.get("weight", 1.0)
        return -weight * torch.nn.functional.logsigmoid(self.beta * margin)


CASES = [
    {"layout": "shared"},
    {"layout": "padded", "weighting_clamp": 0.2},
    {"max_tokens_per_microbatch": 1, "weighting_clamp": 0.3},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_float64_training_is_a_textbook_loop(tmp_path, options):
    pairs = weighted_pairs(confidences=None)
    with float64_throughout():
        clamp = options.get("weighting_clamp")
        plain = PlainWPO(sharp_llama(), BETA, LEARNING_RATE, clamp=clamp)
        weights = [plain_weight(plain.model, pair).item() for pair in pairs]
        assert clamp is None or min(weights) < clamp < max(weights)
        expected = np.asarray(plain.train(pairs, 4, 6, seed=3))
        named = {"use_weighting": True, **options}
        trainer = make_trainer(tmp_path, sharp_llama(), pairs, options=named)
        got = np.asarray(train(trainer))
    np.testing.assert_allclose(got[:, 0], expected[:, 0], atol=1e-10, rtol=0)
    np.testing.assert_allclose(got[:, 1], expected[:, 1], rtol=1e-8)
    for ours, theirs in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_losses_of_evaluations_and_of_compute_metrics_are_weighted(tmp_path):
    held_out, seen = weighted_pairs(5, seed=7, confidences=None), []
    model, reference = sharp_llama(), tiny_llama(seed=1).double()
    with float64_throughout():
        plain = PlainWPO(model, BETA, LEARNING_RATE)
        plain.reference = reference
        expected = [plain.loss(pair).item() for pair in held_out]
        trainer = make_trainer(
            *(tmp_path, model),
            ref_model=reference,
            eval_dataset=held_out,
            compute_metrics=lambda prediction: seen.append(prediction.losses) or {},
            options={"use_weighting": True, "include_for_metrics": ["loss"]},
        )
        measured = trainer.evaluate()
    assert measured["eval_loss"] == pytest.approx(np.mean(expected), rel=1e-11)
    np.testing.assert_allclose(seen[0], expected, rtol=1e-11)


def test_likelihood_terms_are_not_weighted(tmp_path):
    """The loss of a mixture with sft is the weighted losses plus the plain mean over tokens."""
    pairs = token_pairs(4)
    losses = {}
    with float64_throughout():
        model = sharp_llama()
        weights = [plain_weight(model, pair).item() for pair in pairs]
        for name, options in {
            "sft": {"loss_type": "sft"},
            "both": {"loss_type": ["sigmoid", "sft"], "use_weighting": True},
        }.items():
            options = {**options, "max_steps": 1, "max_tokens_per_microbatch": 4096}
            trainer = make_trainer(tmp_path / name, sharp_llama(), pairs, options=options)
            losses[name] = train(trainer)[0][0]
    expected = np.log(2.0) * np.mean(weights) + losses["sft"]
    assert losses["both"] == pytest.approx(expected, rel=1e-12)


def plain_loss(model, pairs, formula, reference_free):
    """Mean over pairs of weight x formula(a, b, nw, nl), where the policy is its reference."""
    total = 0.0
    for pair in pairs:
        with torch.no_grad():
            answers = [pair[f"{side}_ids"] for side in SIDES]
            logps = [answer_logps(model, pair["prompt_ids"], answer) for answer in answers]
        ratios = logps if reference_free else [torch.zeros(()).double()] * 2
        loss = formula(*ratios, *map(len, answers))
        total += (plain_weight(model, pair) * loss).item() / len(pairs)
    return total


def simpo(lw, ll, nw, nl):
    return -torch.nn.functional.logsigmoid(2.0 * (lw / nw - ll / nl) - 0.5)


@pytest.mark.parametrize("rows", [1, 4096])
def test_a_reference_free_loss_and_a_loss_of_ones_own(tmp_path, rows):
    """A step of all pairs, in one micro-batch or in ten."""
    pairs = token_pairs(10)
    options = {"use_weighting": True, "max_steps": 1, "max_tokens_per_microbatch": rows}
    options |= {"per_device_train_batch_size": 10, "gradient_accumulation_steps": 1}

    def own(chosen, rejected, *lengths):
        return (rejected - chosen + 1.5).square()

    with float64_throughout():
        for name, given, more, formula in (
            ("simpo", {"loss_type": "simpo", "beta": 2.0}, {}, simpo),
            ("own", {}, {"loss_fn": own}, own),
        ):
            folder, model = tmp_path / name, sharp_llama()
            expected = plain_loss(model, pairs, formula, reference_free=name == "simpo")
            trainer = make_trainer(folder, model, pairs, options={**options, **given}, **more)
            assert train(trainer)[0][0] == pytest.approx(expected, rel=1e-11), name


def test_each_datasets_loss_is_weighted(tmp_path):
    """The metrics of datasets add up to the loss."""
    mixed = mix_preferences({"a": token_pairs(5), "b": token_pairs(5, seed=1)}, shares=None, seed=0)
    trainer = make_trainer(
        tmp_path, sharp_llama(), mixed, options={"use_weighting": True, "max_steps": 2}
    )
    train(trainer)
    log = trainer.state.log_history[0]
    low, high = sorted((log["loss/a"], log["loss/b"]))
    assert low <= log["loss"] <= high


def test_a_policy_that_is_not_its_reference_is_told_weighted_losses(tmp_path):
    """The check of the first step compares log-ratios; its message has both weighted losses."""
    pairs = token_pairs(4)
    trainer = make_trainer(tmp_path, sharp_llama(), pairs, options={"use_weighting": True})
    trainer.score_datasets()
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.01)
    with pytest.raises(ModelError, match=r"first batch's loss is 0\.\d+, .* which gives 0\.\d+"):
        trainer.train()


REFUSED = [
    ({"use_weighting": True, "loss_type": "sft"}, "use_weighting is true, but it weights losses"),
    (
        {"use_weighting": True, "loss_type": ["sigmoid", "aot"]},
        r"use_weighting: the sigmoid \+ aot loss couples pairs, so no pair has a loss of its own",
    ),
    ({"use_weighting": "yes"}, "use_weighting: got 'yes', expected true or false"),
    ({"use_weighting": True, "weighting_clamp": 0.0}, "weighting_clamp: got 0.0, expected a fin"),
    ({"weighting_clamp": float("nan")}, "weighting_clamp: got nan, expected a finite number above"),
    (
        {"use_weighting": True, "weighting_clamp": "1"},
        "weighting_clamp: got '1', expected a finite",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_wrong_options_are_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(tmp_path, options=options)


def test_losses_that_couple_pairs_are_refused_however_they_come(tmp_path):
    options = {"use_weighting": True, "max_steps": 1}
    function = CoupledFunction(lambda chosen, rejected, lengths: rejected - chosen.mean())
    with pytest.raises(ConfigError, match="use_weighting: the custom loss couples pairs"):
        make_trainer(tmp_path, options=options, loss_fn=function)
    trainer = make_trainer(tmp_path, options=options)
    trainer.pair_loss = make_coupled_loss("aot", beta=BETA)
    with pytest.raises(ConfigError, match="use_weighting: the aot loss couples pairs"):
        trainer.train()


def test_a_clamp_without_weights_is_remarked(tmp_path, caplog):
    make_trainer(tmp_path, options={"weighting_clamp": 1.0})
    assert "weighting_clamp=1.0 (only use_weighting has it)" in caplog.text


def test_a_resumed_run_has_the_same_weighting(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "use_weighting": True}
    train(make_trainer(tmp_path, options=options))
    for other in ({"use_weighting": False}, {"weighting_clamp": 1.0}):
        changed = make_trainer(tmp_path, options={**options, "max_steps": 4, **other})
        with pytest.raises(CheckpointError, match=next(iter(other))):
            changed.train(resume_from_checkpoint=True)
