"""Parts for pictures and sound: frozen in training on text, saved as they were."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import load_file

from dpofast.data.packing.collate import Layout
from dpofast.model.load import load_policy
from dpofast.model.unreached import freeze_unreached
from tests.exactness import SHORT, laid_out
from tests.families import FAMILIES, tiny_model
from tests.newer_families import MULTIMODAL_PACKABLE, MULTIMODAL_PADDED
from tests.support import make_trainer, tiny_llama, train

NAME = "gemma3 with pictures"


def pictures_model():
    """A tiny Gemma 3 with its vision tower, for the tokens of the tests' tokenizer."""
    class_name, fields = FAMILIES[NAME]
    text = {**fields["text_config"], "vocab_size": 300}
    fields = {**fields, "text_config": text, "image_token_index": 299, "boi_token_index": 298}
    torch.manual_seed(0)
    config = getattr(transformers, class_name)(**{**fields, "eoi_token_index": 297})
    return transformers.AutoModelForCausalLM.from_config(config)


def of_pictures(tensors):
    return {
        name: tensor.clone()
        for name, tensor in tensors
        if "vision_tower" in name or "multi_modal_projector" in name
    }


@pytest.mark.slow  # a model of every family
@pytest.mark.parametrize("family", {**MULTIMODAL_PACKABLE, **MULTIMODAL_PADDED})
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


@pytest.mark.parametrize("with_adapter", [False, True])
def test_training_on_text_packs_and_leaves_the_vision_tower_as_it_was(
    tmp_path, caplog, with_adapter
):
    caplog.set_level(logging.INFO, logger="dpofast")
    model = pictures_model()
    before = of_pictures(model.state_dict().items())
    adapter = {"peft_config": LoraConfig(target_modules=["q_proj"])} if with_adapter else {}
    options = {"max_steps": 2, "weight_decay": 0.5, "save_strategy": "no"}
    trainer = make_trainer(tmp_path / "run", model, options=options, **adapter)
    assert trainer.layout.name == "shared"
    losses = train(trainer)
    assert losses[0] != losses[1]
    assert [record for record in caplog.records if "Frozen: " in record.message]
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained
    assert not of_pictures((name, trainer.model.get_parameter(name)) for name in trained)
    if with_adapter:
        return
    trainer.save_model(str(tmp_path / "saved"))
    stored = of_pictures(load_file(tmp_path / "saved" / "model.safetensors").items())
    assert len(stored) == len(before)
    loaded = of_pictures(load_policy(str(tmp_path / "saved")).state_dict().items())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in before.items())
