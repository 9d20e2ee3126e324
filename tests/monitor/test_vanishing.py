"""The warning about updates that vanish is right: it counts what the weights do in real steps."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import peft
import pytest
import torch
from torch import nn

from dpofast.monitor.vanishing import (
    VanishingUpdates,
    keeps_masters,
    largest_update,
    share_unmoved,
    trained_share_unmoved,
)
from tests.support import make_trainer, tiny_llama

STEPS = 10


def moved_in_training(folder, caplog, dtype=torch.bfloat16, model=None, **options):
    """Share of the trained weights that differ after some steps, and the warnings."""
    model = tiny_llama().to(dtype) if model is None else model
    trainer = make_trainer(folder, model, options={"max_steps": STEPS, **options})
    caplog.clear()
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    trainer.train()
    moved = sum(int((old != new).sum()) for old, new in zip(before, trained, strict=True)) / sum(
        map(torch.numel, trained)
    )
    lines = [r.message for r in caplog.records if r.name == "dpofast.monitor.vanishing"]
    return moved, lines


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "adagrad"])
def test_weights_in_bf16_hardly_move_at_a_small_rate_and_the_run_says_so(tmp_path, caplog, optim):
    moved, lines = moved_in_training(tmp_path, caplog, optim=optim, learning_rate=1e-6)
    assert moved < 0.02
    (line,) = lines
    assert line.startswith("learning_rate: the updates will vanish for ")
    said = float(line.split("for ")[1].split("%")[0]) / 100
    assert said == pytest.approx(1 - moved, abs=0.05)
    assert "They are bfloat16, and adding 1e-06" in line


def test_sgd_with_clipped_gradients_is_bounded_and_without_is_not_known(tmp_path, caplog):
    options = {"optim": "sgd", "learning_rate": 1e-5}
    moved, lines = moved_in_training(tmp_path / "a", caplog, **options)
    assert moved < 0.02
    assert len(lines) == 1
    _, lines = moved_in_training(tmp_path / "b", caplog, **options, max_grad_norm=0.0)
    assert lines == []


def test_a_rate_that_moves_them_is_silent(tmp_path, caplog):
    moved, lines = moved_in_training(tmp_path, caplog, learning_rate=1e-3)
    assert moved > 0.8  # the others belong to tokens that no pair has
    assert lines == []


def test_float32_weights_move_under_autocast_and_are_silent(tmp_path, caplog):
    moved, lines = moved_in_training(
        tmp_path, caplog, dtype=torch.float32, learning_rate=1e-6, bf16=True
    )
    assert moved > 0.8  # the others belong to tokens that no pair has
    assert lines == []


def test_an_adapter_counts_and_not_its_base(tmp_path, caplog):
    config = peft.LoraConfig(r=4, target_modules="all-linear")
    base = tiny_llama().to(torch.bfloat16)
    wide = peft.get_peft_model(base, config)  # peft makes its weights float32
    moved, lines = moved_in_training(tmp_path / "a", caplog, model=wide, learning_rate=1e-6)
    assert moved > 0.8  # the others belong to tokens that no pair has
    assert lines == []
    base = tiny_llama().to(torch.bfloat16)
    half = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    _, lines = moved_in_training(tmp_path / "b", caplog, model=half, learning_rate=1e-6)
    assert len(lines) == 1


def test_an_optimizer_of_ones_own_and_a_schedule_with_warmup(tmp_path, caplog):
    model = tiny_llama().to(torch.bfloat16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6)
    trainer = make_trainer(tmp_path, model, options={"max_steps": 2}, optimizers=(optimizer, None))
    trainer.train()
    assert [r for r in caplog.records if "updates will vanish" in r.message]
    caplog.clear()
    warmup = {"warmup_steps": 5, "lr_scheduler_type": "linear", "learning_rate": 1e-3}
    model = tiny_llama().to(torch.bfloat16)
    make_trainer(tmp_path / "warm", model, options={"max_steps": 2, **warmup}).train()
    assert not [r for r in caplog.records if "updates will vanish" in r.message]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_share_of_weights_that_an_update_leaves(dtype):
    bits = {torch.bfloat16: 8, torch.float16: 11}[dtype]
    weights = torch.tensor([1.0, -1.0, 1.5, 0.0], dtype=dtype)
    # Below 1, numbers lie half as far apart as above.
    half_a_step_below, half_a_step_above = 2.0 ** -(bits + 1), 2.0**-bits
    assert share_unmoved(weights, 0.9 * half_a_step_below) == 1.0
    assert share_unmoved(weights, 1.1 * half_a_step_below) == pytest.approx(1 / 3)
    assert share_unmoved(weights, 1.1 * half_a_step_above) == 0.0
    assert share_unmoved(torch.zeros(3, dtype=dtype), 1e-9) == 0.0


def test_parameters_count_by_their_size():
    halves = nn.Parameter(torch.ones(3000, dtype=torch.bfloat16))
    wide = nn.Parameter(torch.ones(1000))
    assert trained_share_unmoved([halves, wide], 1e-6) == 0.75
    assert trained_share_unmoved([], 1e-6) == 0.0


def optimizer_named(name, options=None, **attributes):
    group = {"lr": 1e-4, "momentum": 0.9, **(options or {})}
    return type(name, (), {"param_groups": [group], **attributes})()


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (optimizer_named("AdamW8bit"), 1e-4),
        (optimizer_named("AdamW", {"lr": 0.0, "initial_lr": 1e-3}), 1e-3),
        (optimizer_named("Lion"), 1e-4),
        (optimizer_named("RMSprop", {"alpha": 0.75}), 2e-4),
        (SimpleNamespace(optimizer=optimizer_named("AdamW")), 1e-4),  # accelerate's wrapper
        # these keep what rounding would lose
        (optimizer_named("AdamW8bit", bf16_stochastic_round=True), None),
        (optimizer_named("AdamW", {"kahan_sum": True}), None),
        (optimizer_named("AdamW", {"kahan_sum": None}), None),  # optimi: on in half precision
        (optimizer_named("AnyPrecisionAdamW", {"use_kahan_summation": True}), None),
        # and the size of these isn't known
        (optimizer_named("DAdaptAdam"), None),
        (optimizer_named("Muon"), None),
    ],
)
def test_sizes_of_updates(optimizer, expected):
    assert largest_update(optimizer, max_grad_norm=1.0) == expected


def test_each_group_of_parameters_has_its_own_rate(caplog):
    few, many = (nn.Parameter(torch.ones(size, dtype=torch.bfloat16)) for size in (10, 1000))
    groups = [{"params": [few], "lr": 1e-1}, {"params": [many], "lr": 1e-7}]
    options = SimpleNamespace(should_log=True, max_grad_norm=1.0)
    with caplog.at_level(logging.WARNING):
        VanishingUpdates().on_train_begin(options, None, None, optimizer=torch.optim.AdamW(groups))
    assert "vanish for 99%" in caplog.text


def test_momentum_adds_up_updates():
    parameters = [nn.Parameter(torch.ones(2))]
    assert largest_update(torch.optim.SGD(parameters, 1e-3, momentum=0.9), 0.5) == pytest.approx(
        5e-3
    )
    assert largest_update(torch.optim.SGD(parameters, 1e-3), 0.0) is None


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"bf16": {"enabled": True}}, True),
        ({"fp16": {"enabled": True}}, True),
        ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, False),
        ({"bf16": {"enabled": False}}, False),
    ],
)
def test_copies_that_deepspeed_keeps(config, expected):
    plugin = SimpleNamespace(deepspeed_config=config)
    assert keeps_masters(SimpleNamespace(deepspeed_plugin=plugin)) is expected
    assert keeps_masters(SimpleNamespace(deepspeed_plugin=None)) is False
