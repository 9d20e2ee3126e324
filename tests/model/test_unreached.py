"""Parts for pictures and sound: frozen in training on text, saved as they were."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import LoraConfig

from dpofast.data.packing.collate import Layout
from dpofast.model.load import load_policy
from dpofast.model.unreached import freeze_unreached
from tests.exactness import SHORT, laid_out
from tests.families import FAMILIES, tiny_model
from tests.newer_families import MULTIMODAL_PACKABLE, MULTIMODAL_PADDED
from tests.support import make_trainer, tiny_llama, train

MULTIMODAL = {**MULTIMODAL_PACKABLE, **MULTIMODAL_PADDED}


def for_the_tokenizer(value):
    """Fields of a config, and of the configs in it, with rows for the tests' tokenizer."""
    if not isinstance(value, dict):
        return value
    vocabulary = dict.fromkeys({"vocab_size", "vocab_size_per_layer_input"} & {*value}, 300)
    return {name: for_the_tokenizer(field) for name, field in value.items()} | vocabulary


def multimodal_model(family, monkeypatch):
    class_name, fields = MULTIMODAL[family]
    monkeypatch.setitem(FAMILIES, family, (class_name, for_the_tokenizer(fields)))
    return tiny_model(family)


def of_pictures(tensors):
    return {
        name: tensor
        for name, tensor in tensors
        if "vision_tower" in name or "multi_modal_projector" in name
    }


@pytest.mark.slow  # a model of every family
@pytest.mark.parametrize("family", MULTIMODAL)
def test_exactly_what_gets_no_gradient_is_frozen(family):
    model = tiny_model(family).double()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    laid_out(model, SHORT, Layout("padded"))
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    freeze_unreached(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == reached
    assert reached < trained


def test_nothing_of_a_text_model_is_frozen(caplog):
    caplog.set_level(logging.INFO, logger="dpofast")
    model = tiny_llama()
    freeze_unreached(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not caplog.records


def test_training_with_an_adapter_leaves_the_vision_tower_as_it_was(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="dpofast")
    model = multimodal_model("gemma3 with pictures", monkeypatch)
    adapter = LoraConfig(target_modules=["q_proj"])  # the tower has such modules, too
    trainer = make_trainer(tmp_path, model, options={"max_steps": 2}, peft_config=adapter)
    assert [record for record in caplog.records if "Frozen: " in record.message]
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained
    assert not of_pictures((name, trainer.model.get_parameter(name)) for name in trained)
    train(trainer)


@pytest.mark.parametrize(
    "family",
    [
        "gemma3 with pictures",
        *(
            pytest.param(family, marks=pytest.mark.slow)
            for family in sorted({*MULTIMODAL} - {"gemma3 with pictures"})
        ),
    ],
)
def test_training_on_text_saves_the_other_parts_as_they_were(tmp_path, monkeypatch, family):
    model = multimodal_model(family, monkeypatch)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = {"max_steps": 2, "weight_decay": 0.5, "save_strategy": "no"}
    trainer = make_trainer(tmp_path / "run", model, options=options)
    assert trainer.layout.name == ("shared" if family in MULTIMODAL_PACKABLE else "padded")
    losses = train(trainer)
    assert losses[0] != losses[1]
    trainer.save_model(str(tmp_path / "saved"))
    loaded = load_policy(str(tmp_path / "saved"))
    assert type(loaded) is type(model)
    frozen = {name for name, p in trainer.model.named_parameters() if not p.requires_grad}
    assert frozen
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, trainer.model.state_dict()[name]), name
        assert name not in frozen or torch.equal(tensor, before[name]), name
