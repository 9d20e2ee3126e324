from __future__ import annotations

import importlib.util

import pytest
import torch
from transformers import Trainer
from transformers.training_args import OptimizerNames

from dpofast.errors import ConfigError
from dpofast.options.config import DPOConfig
from dpofast.options.optimizers import check_optimizer
from tests.support import make_trainer, tiny_llama, train

NAMES = [each.value for each in OptimizerNames]


def test_the_default_is_a_fused_adamw(tmp_path):
    config = DPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    assert config.optim == OptimizerNames.ADAMW_TORCH_FUSED
    optimizer, arguments = Trainer.get_optimizer_cls_and_kwargs(config)
    assert optimizer is torch.optim.AdamW
    assert arguments["fused"] is True


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("paged_")])
def test_paged_states_need_cuda_and_the_name_without_them_is_one(name):
    with pytest.raises(ConfigError, match=f"'{name}' keeps .* on a CPU use") as refusal:
        check_optimizer(name, use_cpu=True)
    instead = str(refusal.value).rstrip(".").rpartition(" ")[2]
    assert instead in NAMES


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("_layerwise")])
def test_optimizers_that_step_in_each_backward_pass_are_refused(name):
    """A step of several micro-batches would otherwise begin with other weights in each of them."""
    with pytest.raises(ConfigError, match="updates the weights in each micro-batch") as refusal:
        check_optimizer(name, use_cpu=True)
    assert f"use {name.removesuffix('_layerwise')}, which" in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lomo", "'lomo' isn't supported, as it updates the weights"),
        ("adalomo", "use adafactor or adamw_8bit"),
        ("muon", r"transformers has no optimizer 'muon'; .*optimizers=\(optimizer, None\)"),
    ],
)
def test_others_are_refused_by_name_with_what_to_do(name, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        make_trainer(tmp_path, "a model that isn't there", options={"optim": name})


def test_bitsandbytes_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("adamw_8bit", "lion_32bit", "rmsprop_bnb", "ademamix"):
        with pytest.raises(ConfigError, match=rf"'{name}' needs bitsandbytes: pip install"):
            check_optimizer(name, use_cpu=True)
    for name in ("adamw_torch", "adafactor", "rmsprop", "adamw_torch_8bit", "sgd"):
        check_optimizer(name, use_cpu=True)


@pytest.mark.parametrize("name", ["adamw_8bit", "adafactor"])
def test_optimizers_that_save_memory_train_on_a_cpu(tmp_path, name):
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes", reason="needs the extra `bitsandbytes`")
    trainer = make_trainer(tmp_path, tiny_llama(hidden_size=64), options={"optim": name})
    losses = [loss for loss, _ in train(trainer)]
    assert losses[-1] < 0.6
    if name == "adamw_8bit":
        state = trainer.optimizer.state[trainer.model.lm_head.weight]
        assert state["state1"].dtype == torch.uint8


def test_muon_trains_matrices_when_it_is_passed(tmp_path):
    model = tiny_llama()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() == 2)
    matrices = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Muon(matrices, lr=1e-3, weight_decay=0.0)
    losses = [
        loss for loss, _ in train(make_trainer(tmp_path, model, optimizers=(optimizer, None)))
    ]
    assert losses[-1] < 0.68
