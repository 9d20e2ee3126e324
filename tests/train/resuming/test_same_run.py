"""A resumed run is the same run: its logs, its sums, and what may change on the way."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import softplus
from transformers import EarlyStoppingCallback, get_scheduler

from dpofast.errors import CheckpointError, ConfigError
from tests.support import history, make_trainer, tiny_llama, token_pairs, train

SPEEDS = ("_per_second", "runtime")
LORA = LoraConfig(r=2, target_modules=["q_proj"])


def saving(**options):
    return {"save_strategy": "steps", "save_steps": 2, **options}


def checkpoint(folder, step):
    return str(folder / "run" / f"checkpoint-{step}")


def without_speeds(logs):
    return [{key: value for key, value in log.items() if not key.endswith(SPEEDS)} for log in logs]


def resume(folder, step=4, *, pairs=None, model=None, **options):
    """Resume from a checkpoint in a run with some other options, and return the trainer."""
    arguments = {key: options.pop(key) for key in ("loss_fn", "peft_config") if key in options}
    trainer = make_trainer(folder, model, pairs, options=saving(**options), **arguments)
    trainer.train(resume_from_checkpoint=checkpoint(folder, step))
    return trainer


def refusal(folder, **options):
    with pytest.raises(CheckpointError) as caught:
        resume(folder, **options)
    return str(caught.value)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of six steps with a schedule, and its folder."""
    folder = tmp_path_factory.mktemp("same")
    options = saving(lr_scheduler_type="linear", weight_decay=0.1)
    return folder, train(make_trainer(folder, options=options))


SCHEDULE = {"lr_scheduler_type": "linear", "weight_decay": 0.1}


def test_sums_between_two_logs_are_part_of_the_checkpoint(tmp_path):
    """Logs after steps 3 and 6; resumed after step 2, between two logs, and after 4."""
    options = saving(logging_steps=3)
    straight = make_trainer(tmp_path, options=options)
    output = straight.train()
    for step in (2, 4):
        resumed = make_trainer(tmp_path, options=options)
        again = resumed.train(resume_from_checkpoint=checkpoint(tmp_path, step))
        found, expected = resumed.state.log_history, straight.state.log_history
        assert without_speeds(found) == without_speeds(expected)
        assert again.training_loss == output.training_loss == found[-1]["train_loss"]
        assert (resumed.first_loss, resumed.pairs_trained) == (straight.first_loss, 20)
        assert resumed.pairs_before == {2: 8, 4: 14}[step]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["pairs_trained"] == 20
    assert summary["pairs_per_second"] == pytest.approx(6 / summary["train_seconds"])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("learning_rate", {"learning_rate": 1e-3}),
        ("seed", {"seed": 4}),
        ("data_seed", {"data_seed": 4}),
        ("beta", {"beta": 0.1}),
        ("loss_type", {"loss_type": "ipo"}),
        ("loss_weights", {"loss_weights": [3.0]}),
        ("f_divergence_type", {"f_divergence_type": "js_divergence"}),
        ("loss_fn", {"loss_fn": lambda chosen, rejected, lengths: softplus(rejected - chosen)}),
        ("max_grad_norm", {"max_grad_norm": 0.3}),
        ("max_steps", {"max_steps": 8}),
        ("warmup_steps", {"warmup_steps": 2}),
        ("ld_alpha: none in the checkpoint, 0.5 now", {"ld_alpha": 0.5}),
        ("disable_dropout", {"disable_dropout": False}),
        ("pairs_per_step", {"per_device_train_batch_size": 4}),
        ("optim", {"optim": "sgd"}),
        ("data: ", {"pairs": token_pairs(10, seed=1)}),
        ("dtype", {"model": "bfloat16"}),
        ("config.rms_norm_eps", {"model": "config"}),
        ("adapter.r: none in the checkpoint, 2 now", {"peft_config": LORA}),
    ],
)
def test_what_changes_the_numbers_is_refused_by_name(run, name, options):
    folder, _ = run
    given = {**SCHEDULE, **options}
    if given.get("model") == "bfloat16":
        given["model"] = tiny_llama().to(torch.bfloat16)
    elif given.get("model") == "config":
        given["model"] = tiny_llama(rms_norm_eps=1e-3)
    message = refusal(folder, **given)
    assert f"\n  {name}" in message
    assert "checkpoint-4" in message


def test_options_that_the_loss_does_not_have_may_change(run):
    folder, expected = run
    none = {"discopop_tau": 0.3, "loss_weights": [1.0], "f_alpha_divergence_coef": 0.9}
    none |= {"beta_end": 0.3, "beta_max": 7.0, "target_kl_gain": 0.5}
    none |= {"ld_alpha": 1.0}
    assert history(resume(folder, **SCHEDULE, **none)) == expected


def test_what_changes_only_rounding_goes_on(run, caplog):
    folder, expected = run
    with caplog.at_level(logging.INFO, logger="dpofast"):
        trainer = resume(
            folder,
            **SCHEDULE,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            layout="padded",
            max_length=200,
            logging_strategy="steps",
        )
    assert history(trainer) == pytest.approx(np.array(expected), rel=1e-4)
    assert "per_device_train_batch_size: 2 in the checkpoint, 1 now" in caplog.text
    assert "layout: auto in the checkpoint, padded now" in caplog.text


def rates(trainer):
    return [log["learning_rate"] for log in trainer.state.log_history if "grad_norm" in log]


def schedule_of(total, *, rate=5e-3, name="linear", warmup=0):
    """The learning rate of each step, from transformers itself."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=rate)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    found = []
    for _ in range(total):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize(
    ("options", "schedule"),
    [
        ({"learning_rate": 1e-3}, {"rate": 1e-3}),
        ({"lr_scheduler_type": "cosine"}, {"name": "cosine"}),
        ({"warmup_steps": 5}, {"warmup": 5}),
        ({"max_steps": 8}, {"total": 8}),
        ({"learning_rate": 1e-3, "max_steps": 8}, {"rate": 1e-3, "total": 8}),
    ],
)
def test_an_allowed_schedule_holds_from_the_next_step_on(run, options, schedule):
    folder, expected = run
    trainer = resume(folder, **{**SCHEDULE, **options}, allow_changed=list(options))
    wanted = schedule_of(**{"total": 6, **schedule})
    assert rates(trainer) == schedule_of(6)[:4] + wanted[4:]
    assert history(trainer)[:5] == expected[:5]  # the rate acts on the weights after the step


def test_an_allowed_learning_rate_moves_the_weights_by_as_much(tmp_path):
    """Without momentum, a step is the gradient times the rate: twice the rate, twice the step."""
    options = saving(optim="sgd", max_grad_norm=0.0)
    train(make_trainer(tmp_path, options=options))
    start = {}
    moved = {}
    for rate in (5e-3, 1e-2):
        trainer = make_trainer(
            tmp_path,
            options={**options, "learning_rate": rate, "max_steps": 5}
            | {"allow_changed": ["learning_rate"]},
        )
        trainer.train(resume_from_checkpoint=checkpoint(tmp_path, 4))
        moved[rate] = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    saved = make_trainer(tmp_path, options=options)
    saved._load_from_checkpoint(checkpoint(tmp_path, 4))
    start = torch.cat([p.detach().flatten() for p in saved.model.parameters()])
    torch.testing.assert_close(moved[1e-2] - start, 2 * (moved[5e-3] - start), rtol=0, atol=3e-7)


def groups(trainer, key):
    return [group[key] for group in trainer.optimizer.param_groups]


def test_allowed_entries_of_the_optimizer_are_applied(run):
    folder, _ = run
    options = {**SCHEDULE, "weight_decay": 0.3, "adam_beta2": 0.9, "adam_epsilon": 1e-6}
    trainer = resume(folder, **options, allow_changed="weight_decay,adam_beta2,adam_epsilon")
    assert groups(trainer, "weight_decay") == [0.3, 0.0]  # the second group is without decay
    assert groups(trainer, "betas") == [(0.9, 0.9)] * 2
    assert groups(trainer, "eps") == [1e-6] * 2


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("beta", {"beta": 0.1}),
        ("loss_type", {"loss_type": "ipo"}),
        ("loss_fn", {"loss_fn": lambda chosen, rejected, lengths: softplus(rejected - chosen)}),
        ("max_grad_norm", {"max_grad_norm": 0.01}),
        ("data", {"pairs": token_pairs(10, seed=1)}),
        ("seed", {"seed": 4, "data_seed": 3}),
        ("data_seed", {"data_seed": 4}),
    ],
)
def test_other_allowed_changes_act_from_the_next_step_on(run, name, options):
    folder, expected = run
    found = history(resume(folder, **SCHEDULE, **options, allow_changed=[name]))
    assert found[:4] == expected[:4]
    if name == "seed":  # the order has a seed of its own, and no step draws another number
        assert found == expected
    elif name == "max_grad_norm":  # the norm is logged before clipping
        assert found[4] == expected[4]
        assert found[5] != expected[5]
    else:
        assert found[4] != expected[4]


def test_unknown_names_are_refused_before_anything_else(tmp_path):
    with pytest.raises(ConfigError, match="allow_changed: 'learningrate' is unknown"):
        make_trainer(tmp_path, options={"allow_changed": ["learningrate"]}).train()
    train(make_trainer(tmp_path, options={"allow_changed": ["beta"], "max_steps": 1}))


def test_an_adapter_is_refused_on_another_base_model(tmp_path):
    options = saving(max_steps=4)
    expected = train(make_trainer(tmp_path, peft_config=LORA, options=options))
    other = make_trainer(tmp_path, tiny_llama(seed=1), peft_config=LORA, options=options)
    with pytest.raises(CheckpointError, match=r"base_model: .*the adapter was trained on it"):
        other.train(resume_from_checkpoint=checkpoint(tmp_path, 2))
    # The base model is known by its weights, also below an adapter that contributes.
    trained = get_peft_model(tiny_llama(), LORA)
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    again = make_trainer(tmp_path, trained, options=options)
    again.train(resume_from_checkpoint=checkpoint(tmp_path, 2))
    assert history(again) == expected


def test_a_checkpoint_without_facts_is_resumed_with_a_warning(tmp_path, caplog):
    expected = train(make_trainer(tmp_path, options=saving()))
    path = tmp_path / "run" / "checkpoint-4" / "dpofast_state.json"
    state = json.loads(path.read_text())
    del state["facts"], state["sums"]
    path.write_text(json.dumps(state))
    (path.parent / "dpofast_manifest.json").unlink()  # nor had early versions a manifest
    assert history(resume(tmp_path, verify_checkpoint=False)) == expected
    assert "doesn't record its data and options" in caplog.text


def test_steps_between_saves_are_those_of_the_options_now(run):
    folder, _ = run
    trainer = resume(folder, **SCHEDULE, save_total_limit=None, output_dir=str(folder / "other"))
    assert trainer.state.save_steps == 2
    options = {**saving(), **SCHEDULE, "save_steps": 5, "output_dir": str(folder / "third")}
    trainer = make_trainer(folder, options=options)
    trainer.train(resume_from_checkpoint=checkpoint(folder, 4))
    assert sorted(path.name for path in (folder / "third").glob("checkpoint-*")) == [
        "checkpoint-5",
        "checkpoint-6",
    ]


def test_early_stopping_goes_on_with_its_patience(tmp_path):
    """The loss of this evaluation set rises, so training stops after the third evaluation."""
    held_out = token_pairs(2, seed=4)
    options = saving(
        eval_strategy="steps",
        eval_steps=2,
        max_steps=12,
        load_best_model_at_end=True,
        metric_for_best_model="eval_rewards/margins",
        greater_is_better=False,
        learning_rate=0.0,
    )

    def stopping():
        callback = EarlyStoppingCallback(early_stopping_patience=2)
        return make_trainer(tmp_path, options=options, eval_dataset=held_out, callbacks=[callback])

    straight = stopping()
    straight.train()
    assert straight.state.global_step == 6
    resumed = stopping()
    resumed.train(resume_from_checkpoint=checkpoint(tmp_path, 4))
    assert resumed.state.global_step == 6
    # A callback that the checkpoint doesn't know can still be saved.
    late = make_trainer(tmp_path, options={**options, "max_steps": 5}, eval_dataset=held_out)
    late.train(resume_from_checkpoint=checkpoint(tmp_path, 2))
