"""Metrics over tokens equal a plain computation from all logits, in training and evaluation."""

from __future__ import annotations

import copy

import pytest
import torch

from dpofast.errors import ConfigError
from dpofast.options.metric_fields import TOKEN_METRICS
from tests.support import float64_throughout, make_trainer, token_pairs, train
from tests.train.test_wpo import sharp_llama

ALL = list(TOKEN_METRICS)
SIDES = ("chosen", "rejected")


def plain_rows(model, pair, side):
    """Entropy, mean logit and accuracy of each token of an answer: [3, n]."""
    prompt, answer = pair["prompt_ids"], pair[f"{side}_ids"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits
    logits = logits[0, len(prompt) - 1 : -1]  # [n, V]
    is_top = (logits.argmax(-1) == torch.tensor(answer)).double()
    return torch.stack([torch.special.entr(logits.softmax(-1)).sum(-1), logits.mean(-1), is_top])


def plain_metrics(model, pairs):
    """TRL's metrics of a set of pairs, as means over all its tokens."""
    chosen, rejected = (
        torch.cat([plain_rows(model, pair, side) for pair in pairs], 1) for side in SIDES
    )
    return {
        "mean_token_accuracy": chosen[2].mean().item(),
        "entropy": torch.cat([chosen, rejected], 1)[0].mean().item(),
        "logits/chosen": chosen[1].mean().item(),
        "logits/rejected": rejected[1].mean().item(),
    }


def pairs_with_top_tokens(num_pairs, seed=0):
    """Pairs of which some tokens are the most likely ones of the model, so its accuracy isn't 0."""
    model, rows = sharp_llama(), []
    for pair in token_pairs(num_pairs, seed):
        answer = pair["chosen_ids"]
        with torch.no_grad():
            top = model(input_ids=torch.tensor([pair["prompt_ids"]])).logits[0, -1].argmax().item()
        rows.append({**pair, "chosen_ids": [top, *answer[1:]]})
    return type(token_pairs(1)).from_list(rows)


@pytest.mark.parametrize(
    "options",
    [
        {"layout": "shared"},
        {"layout": "padded"},
        {"max_tokens_per_microbatch": 1},
        {"use_weighting": True, "ld_alpha": 0.5},
        {"loss_type": "orpo", "max_tokens_per_microbatch": 64},  # prompts are sequences, too
        {"loss_type": "aot"},
    ],
    ids=str,
)
def test_training_and_evaluation_equal_a_plain_computation(tmp_path, options):
    """A log covers two steps with another model each; the rate is so small that they are alike."""
    pairs, held_out = pairs_with_top_tokens(8), pairs_with_top_tokens(5, seed=4)
    with float64_throughout():
        model = sharp_llama()
        given = {"metrics": ALL, "max_steps": 2, "logging_steps": 2, "learning_rate": 1e-13}
        trainer = make_trainer(
            *(tmp_path, copy.deepcopy(model), pairs),
            eval_dataset=held_out,
            options={**given, "optim": "sgd", **options},
        )
        evaluated = trainer.evaluate()
        trainer.train()
        log = next(log for log in trainer.state.log_history if "grad_norm" in log)
        for got, of in ((log, pairs), (evaluated, held_out)):
            prefix = "eval_" if got is evaluated else ""
            expected = plain_metrics(model, of)
            assert 0.0 < expected["mean_token_accuracy"] < 1.0
            for name, value in expected.items():
                assert got[prefix + name] == pytest.approx(value, rel=1e-10), name


def test_only_the_accuracy_is_measured_by_default_and_nothing_if_the_list_is_empty(tmp_path):
    for options, expected in (({}, {"mean_token_accuracy"}), ({"metrics": []}, set())):
        trainer = make_trainer(tmp_path / str(len(expected)), options={"max_steps": 1, **options})
        train(trainer)
        assert trainer.state.log_history[0].keys() & set(ALL) == expected


def test_a_resumed_run_logs_the_means_of_one_that_never_stopped(tmp_path):
    """The checkpoint falls between two logs."""
    options = {"metrics": ALL, "max_steps": 6, "logging_steps": 4, "save_steps": 3}
    options |= {"save_strategy": "steps"}
    whole = make_trainer(tmp_path / "whole", options=options)
    whole.train()
    make_trainer(tmp_path / "parts", options=options).train()
    resumed = make_trainer(tmp_path / "parts", options=options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "run" / "checkpoint-3"))
    expected, got = (
        {log["step"]: log for log in each.state.log_history} for each in (whole, resumed)
    )
    for name in ALL:
        assert got[4][name] == pytest.approx(expected[4][name], rel=1e-9), name


def test_the_best_checkpoint_can_be_chosen_by_them(tmp_path):
    options = {"metrics": ["entropy"], "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    options |= {"metric_for_best_model": "entropy", "greater_is_better": False}
    make_trainer(tmp_path, eval_dataset=token_pairs(2), options=options).train()
    options["metric_for_best_model"] = "logits/chosen"
    trainer = make_trainer(tmp_path, eval_dataset=token_pairs(2), options=options)
    with pytest.raises(ConfigError, match=r"measures 'eval_logits/chosen'.*eval_entropy"):
        trainer.train()


def test_their_names_are_reserved(tmp_path):
    with pytest.raises(ConfigError, match="the names entropy are taken"):
        make_trainer(tmp_path, metrics_fn=lambda pairs: {"entropy": pairs.chosen_logps})
