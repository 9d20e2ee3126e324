from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, TrainerCallback

from dpofast import DPOConfig, DPOTrainer
from dpofast.errors import ConfigError, DPOFastError, ModelError, ReferenceStoreError
from dpofast_kernels import make_loss
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


@pytest.mark.parametrize(
    "options",
    [
        {"layout": "padded"},
        {"layout": "unshared"},
        {"layout": "shared"},
        {"max_tokens_per_microbatch": 40},  # several micro-batches per step, and longer pairs
        {"max_tokens_per_microbatch": 1, "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_float64_training_is_plain_dpo(tmp_path, options):
    pairs = token_pairs(10)
    with float64_throughout():
        expected = PlainDPO(tiny_llama().double(), BETA, LEARNING_RATE).train(pairs, 4, 6, seed=3)
        got = train(make_trainer(tmp_path, tiny_llama().double(), pairs, options=options))
    assert abs(expected[-1][0] / math.log(2) - 1) > 0.05  # it learns
    np.testing.assert_allclose([x[0] for x in got], [x[0] for x in expected], atol=1e-9, rtol=0)
    np.testing.assert_allclose([x[1] for x in got], [x[1] for x in expected], rtol=1e-8)


def test_float32_training_is_plain_dpo(tmp_path):
    pairs = token_pairs(10)
    expected = PlainDPO(tiny_llama(), BETA, LEARNING_RATE).train(pairs, 4, 6, seed=3)
    got = train(make_trainer(tmp_path, pairs=pairs))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(4, 1), (1, 4)])
def test_batch_shape_does_not_change_the_training(tmp_path, shape):
    expected = train(make_trainer(tmp_path))
    options = {"per_device_train_batch_size": shape[0], "gradient_accumulation_steps": shape[1]}
    got = train(make_trainer(tmp_path, options=options))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_gradient_checkpointing_and_bf16_train(tmp_path, gradient_checkpointing):
    options = {"bf16": True, "gradient_checkpointing": gradient_checkpointing}
    got = train(make_trainer(tmp_path, options=options))
    expected = train(make_trainer(tmp_path))
    assert got[0][0] == pytest.approx(math.log(2), abs=2e-2)
    np.testing.assert_allclose([x[0] for x in got], [x[0] for x in expected], rtol=0.1)


def test_the_first_loss_is_ln_2_and_the_logs_have_trls_names(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    first = next(log for log in trainer.state.log_history if "loss" in log)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert trainer.first_loss == pytest.approx(math.log(2), abs=1e-6)
    expected = {f"rewards/{key}" for key in ("chosen", "rejected", "margins", "accuracies")}
    sides = ("chosen", "rejected")
    expected |= {f"{kind}/{side}" for kind in ("logps", "logratios") for side in sides}
    assert expected | {"num_tokens", "learning_rate", "grad_norm", "epoch"} <= first.keys()


def test_a_second_run_makes_no_reference_pass_whatever_changed_but_the_model(tmp_path):
    make_trainer(tmp_path).train()
    changed = {"beta": 0.2, "learning_rate": 1e-4, "loss_type": "ipo", "seed": 9, "max_steps": 2}
    trainer = make_trainer(tmp_path, options={**changed, "output_dir": str(tmp_path / "other")})
    trainer.train()
    summary = json.loads((tmp_path / "other" / "summary.json").read_text())
    assert summary["ref_forward_passes"] == summary["ref_rows_scored"] == 0
    assert summary["ref_store_hits"] == summary["ref_rows_needed"] == 20
    assert summary["layout"] == "shared"
    other_model = make_trainer(tmp_path, tiny_llama(seed=1))
    other_model.train()
    assert other_model.reference.store.totals().rows_scored == 20


def test_one_added_pair_costs_one_pass_and_two_rows(tmp_path):
    pairs = token_pairs(10)
    make_trainer(tmp_path, pairs=pairs).train()
    more = Dataset.from_list([*pairs, *token_pairs(1, seed=8)])
    trainer = make_trainer(tmp_path, pairs=more)
    trainer.train()
    total = trainer.reference.store.totals()
    assert (total.forward_passes, total.rows_scored, total.rows_found) == (1, 2, 20)


def test_without_precompute_nothing_is_kept_and_the_numbers_are_the_same(tmp_path):
    expected = train(make_trainer(tmp_path / "a"))
    got = train(make_trainer(tmp_path / "b", options={"precompute_ref_log_probs": False}))
    assert got == expected
    assert not (tmp_path / "b" / "store").exists()


def test_a_given_reference_model_is_used_and_never_moves(tmp_path):
    reference = tiny_llama(seed=5)
    before = copy.deepcopy(reference.state_dict())
    pairs = token_pairs(4)
    trainer = make_trainer(tmp_path, pairs=pairs, ref_model=reference, options={"max_steps": 1})
    first_loss = train(trainer)[0][0]
    margins = [naive_margin(tiny_llama(), reference, pair) for pair in pairs]
    expected = torch.stack([-torch.nn.functional.logsigmoid(BETA * m) for m in margins]).mean()
    assert first_loss == pytest.approx(expected.item(), rel=1e-5)
    assert all(torch.equal(before[name], value) for name, value in reference.state_dict().items())
    assert all(parameter.grad is None for parameter in reference.parameters())


def test_a_dataset_may_bring_its_own_reference_log_probs(tmp_path):
    pairs, reference = token_pairs(4), tiny_llama(seed=5)
    with torch.no_grad():
        columns = {
            f"ref_{side}_logps": [
                answer_logps(reference, pair["prompt_ids"], pair[f"{side}_ids"]).item()
                for pair in pairs
            ]
            for side in ("chosen", "rejected")
        }
    for name, values in columns.items():
        pairs = pairs.add_column(name, values)
    own = make_trainer(tmp_path, pairs=pairs)
    got = train(own)
    assert own.reference.store.totals() is None
    expected = train(make_trainer(tmp_path, pairs=token_pairs(4), ref_model=reference))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    broken = pairs.remove_columns("ref_chosen_logps").add_column("ref_chosen_logps", [math.nan] * 4)
    with pytest.raises(DPOFastError, match="ref_chosen_logps"):
        make_trainer(tmp_path, pairs=broken).train()


def test_a_second_train_counts_for_itself(tmp_path):
    trainer = make_trainer(tmp_path, options={"logging_steps": 4})
    trainer.train()
    trainer.train()
    assert trainer.pairs_trained == 20  # two epochs of ten pairs
    assert trainer.first_loss < math.log(2) - 0.05  # the policy has moved


def test_small_beta_of_ipo_is_no_reason_to_stop(tmp_path):
    options = {"loss_type": "ipo", "beta": 0.01, "bf16": True, "precompute_ref_batch_size": 5}
    model = tiny_llama(num_hidden_layers=8, hidden_size=64)
    assert train(make_trainer(tmp_path, model, options=options))[0][0] == pytest.approx(2500, 1e-2)


def test_the_first_training_batch_is_checked_also_behind_an_evaluation(tmp_path):
    trainer = make_trainer(
        tmp_path, eval_dataset=token_pairs(2, seed=4), options={"eval_on_start": True}
    )

    class Change(TrainerCallback):
        def on_evaluate(self, args, state, control, model=None, **kwargs):
            model.lm_head.weight.data.mul_(3.0)

    trainer.add_callback(Change())
    with pytest.raises(ModelError, match="first batch"):
        trainer.train()


def test_drop_last_with_too_few_pairs_is_named(tmp_path):
    options = {"dataloader_drop_last": True, "per_device_train_batch_size": 8}
    with pytest.raises(ConfigError, match="dataloader_drop_last"):
        make_trainer(tmp_path, options=options).train()


def test_a_pair_longer_than_the_limit_runs_alone(tmp_path):
    long = {"prompt_ids": [5] * 30, "chosen_ids": [6] * 20, "rejected_ids": [7] * 20}
    pairs = Dataset.from_list([long, *token_pairs(3)])
    options = {"max_steps": 1, "max_tokens_per_microbatch": 60}
    trainer = make_trainer(tmp_path, pairs=pairs, options=options)
    trainer.score_datasets()  # score now: the hook below must not count these passes
    rows = []
    trainer.model.model.embed_tokens.register_forward_hook(
        lambda _, inputs, __: rows.append(inputs[0].numel())
    )
    trainer.train()
    lengths = trainer.train_set().token_limit.lengths
    assert lengths[0] == 70
    assert sorted(rows, reverse=True)[0] == 70
    assert sum(rows) == sum(lengths)
    assert all(row <= 60 for row in rows if row != 70)


def test_workers_lay_out_the_same_steps(tmp_path):
    expected = train(make_trainer(tmp_path))
    assert train(make_trainer(tmp_path, options={"dataloader_num_workers": 2})) == expected


def test_tensorboard_gets_the_logs_by_default(tmp_path):
    assert DPOConfig(output_dir=str(tmp_path)).report_to == ["tensorboard"]
    make_trainer(tmp_path, options={"report_to": "tensorboard", "max_steps": 1}).train()
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


def test_evaluation_gives_exact_means_whatever_the_batch_size(tmp_path):
    held_out, reference = token_pairs(7, seed=4), tiny_llama(seed=5)
    margins = [naive_margin(tiny_llama(), reference, pair).item() for pair in held_out]
    for batch_size in (1, 3, 8):
        trainer = make_trainer(
            tmp_path,
            ref_model=reference,
            eval_dataset=held_out,
            options={"per_device_eval_batch_size": batch_size},
        )
        metrics = trainer.evaluate()
        losses = [math.log1p(math.exp(-BETA * margin)) for margin in margins]
        assert metrics["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
        assert metrics["eval_rewards/margins"] == pytest.approx(BETA * np.mean(margins), rel=1e-4)
        accuracy = np.mean([margin > 0 for margin in margins])
        assert metrics["eval_rewards/accuracies"] == pytest.approx(accuracy)


def test_several_named_sets_and_early_stopping(tmp_path):
    sets = {"near": token_pairs(3, seed=4), "far": token_pairs(5, seed=6)}
    options = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "metric_for_best_model": "eval_near_rewards/accuracies",
        "load_best_model_at_end": True,
        "greater_is_better": True,
        "max_steps": 10,
    }
    trainer = make_trainer(
        tmp_path,
        eval_dataset=sets,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
        options=options,
    )
    trainer.train()
    logs = trainer.state.log_history
    assert any("eval_far_rewards/margins" in log for log in logs)
    scores = [log["eval_near_rewards/accuracies"] for log in logs if "eval_near_loss" in log]
    assert len(scores) < 10, "patience ends the run"
    best = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, best.state_dict()[name])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {"eval_near_loss", "eval_far_loss"} <= summary["last_evaluation"].keys()


def test_a_new_dataset_after_training_is_refused_with_the_remedy(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    with pytest.raises(ReferenceStoreError, match="ref_model"):
        trainer.evaluate(token_pairs(2, seed=77))


def test_outside_the_steps_the_model_is_stock(tmp_path):
    model = tiny_llama()
    stock = copy.deepcopy(model)
    input_ids = torch.arange(5, 15)[None]
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                seen.append(model(input_ids).logits.shape)
            model.generate(input_ids, max_new_tokens=2, do_sample=False)

    trainer = make_trainer(tmp_path, model, callbacks=[Look()], options={"learning_rate": 0.0})
    trainer.train()
    assert seen == [(1, 10, 259)] * 6
    assert "forward" not in model.__dict__
    assert torch.equal(model(input_ids).logits, stock(input_ids).logits)


def test_the_output_folder_loads_and_gives_the_trainers_log_probs(tmp_path):
    held_out = token_pairs(4, seed=4)
    trainer = make_trainer(tmp_path, eval_dataset=held_out)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    with torch.no_grad():
        logps = [answer_logps(loaded, p["prompt_ids"], p["chosen_ids"]).item() for p in held_out]
    assert metrics["eval_logps/chosen"] == pytest.approx(np.mean(logps), rel=1e-5)


@pytest.mark.parametrize(
    ("loss_type", "first"), [("sigmoid", "0.693147"), ("ipo", "1.000000"), ("nca_pair", "1.386294")]
)
def test_a_model_changed_behind_the_trainers_back_is_found_on_the_first_batch(
    tmp_path, loss_type, first
):
    trainer = make_trainer(tmp_path, options={"loss_type": loss_type})
    trainer.evaluate(trainer.train_dataset)  # fixes the run's reference
    with torch.no_grad():
        trainer.model.lm_head.weight.add_(torch.randn_like(trainer.model.lm_head.weight))
    with pytest.raises(ModelError, match=f"The first batch's loss is .*, which gives {first} "):
        trainer.train()


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", ["ipo"], "apo_zero", "dpop"])
def test_every_loss_trains(tmp_path, loss_type):
    losses = train(make_trainer(tmp_path, options={"loss_type": loss_type, "beta": 0.1}))
    assert all(math.isfinite(loss) for loss, _ in losses)
    first = {
        "sigmoid": math.log(2),
        "hinge": 1.0,
        "ipo": 25.0,
        "apo_zero": 1.0,
        "dpop": math.log(2),
    }
    name = loss_type if isinstance(loss_type, str) else loss_type[0]
    assert losses[0][0] == pytest.approx(first[name], rel=1e-4)


def test_label_smoothing_is_conservative_dpo(tmp_path):
    trainer = make_trainer(tmp_path, options={"label_smoothing": 0.2})
    losses = train(trainer)
    plain = train(make_trainer(tmp_path))
    assert losses[0][0] == pytest.approx(math.log(2), abs=1e-6)
    # Smoothing scales the slope at margin 0 by 1 - 2 eps.
    assert losses[0][1] == pytest.approx(plain[0][1] * 0.6, rel=1e-4)


def test_dropout_is_switched_off_and_the_config_keeps_it(tmp_path):
    model = tiny_llama(attention_dropout=0.3)
    expected = train(make_trainer(tmp_path))
    assert train(make_trainer(tmp_path, model)) == expected
    assert model.config.attention_dropout == 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data_collator": len}, "data_collator"),
        ({"options": {"auto_find_batch_size": True}}, "per_device_train_batch_size"),
    ],
)
def test_what_is_not_supported_is_refused_with_the_remedy(tmp_path, arguments, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(tmp_path, **arguments)


def test_searches_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="hyperparameter_search"):
        make_trainer(tmp_path).hyperparameter_search()


def test_a_subclass_changes_the_loss_by_its_hook_or_by_the_loss_itself(tmp_path):
    calls = []

    class Counting(DPOTrainer):
        def compute_pair_loss(self, model, batch, sums):
            calls.append(batch.num_pairs)
            return super().compute_pair_loss(model, batch, sums)

    expected = train(make_trainer(tmp_path / "stock"))
    assert train(make_trainer(tmp_path / "counting", trainer_class=Counting)) == expected
    assert sum(calls) == 20
    other = make_trainer(tmp_path / "other")
    other.pair_loss = make_loss("hinge", beta=0.5)
    hinge = make_trainer(tmp_path / "hinge", options={"loss_type": "hinge", "beta": 0.5})
    assert train(other) == train(hinge) != expected
