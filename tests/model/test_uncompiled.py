"""Compiled models train as plain ones do, and are saved under the names of plain ones."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from dpofast.errors import ConfigError
from dpofast.model.uncompiled import uncompiled
from tests.support import history, make_trainer, tiny_llama


def whole(model):
    return torch.compile(model, backend="eager")


def body(model):
    model.model = torch.compile(model.model, backend="eager")
    return model


def every_layer(model):
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer, backend="eager")
    return model


def head_inside_whole(model):
    model.lm_head = torch.compile(model.lm_head, backend="eager")
    return torch.compile(model, backend="eager")


def in_place(model):
    model.compile(backend="eager")
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


COMPILED = [whole, body, every_layer, head_inside_whole, in_place]


def run(folder, model, **arguments):
    trainer = make_trainer(folder, model, options={"max_steps": 2}, **arguments)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return history(run(tmp_path_factory.mktemp("plain"), tiny_llama()))


@pytest.mark.parametrize("compile_it", COMPILED)
def test_a_compiled_model_trains_and_loads_again(tmp_path, plain, compile_it, caplog):
    caplog.set_level("INFO", logger="dpofast")
    model = tiny_llama()
    trainer = run(tmp_path, compile_it(model))
    assert history(trainer) == plain
    trainer.save_model(str(tmp_path / "saved"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for own, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(own, other)
    (line,) = [record.message for record in caplog.records if "torch.compile" in record.message]
    assert line.startswith("model: torch.compile is taken off")


@pytest.mark.parametrize("compile_it", [whole, body, every_layer])
def test_an_adapter_of_a_compiled_model_loads_again(tmp_path, compile_it):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    trainer = run(tmp_path, peft.get_peft_model(compile_it(tiny_llama()), config))
    trainer.save_model(str(tmp_path / "saved"))
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "saved")
    input_ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        logits = [model.eval()(input_ids).logits for model in (trainer.model, again, tiny_llama())]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_a_compiled_reference_scores_as_a_plain_one(tmp_path):
    reference = tiny_llama(seed=5)
    compiled = whole(copy.deepcopy(reference))
    histories = [
        history(run(tmp_path / name, tiny_llama(), ref_model=given))
        for name, given in (("plain", reference), ("compiled", compiled))
    ]
    assert histories[0] == histories[1]


def test_a_compiled_policy_is_no_reference_for_itself(tmp_path):
    model = tiny_llama()
    with pytest.raises(ConfigError, match="ref_model is the model itself"):
        make_trainer(tmp_path, model, ref_model=whole(model))


def test_other_wrappers_are_refused_with_the_model_inside_named(tmp_path):
    with pytest.raises(ConfigError, match=r"inside DataParallel; .* \(model.module\)"):
        make_trainer(tmp_path, torch.nn.DataParallel(tiny_llama()))


def test_what_is_not_compiled_stays_as_it_is(caplog):
    caplog.set_level("INFO", logger="dpofast")
    model = tiny_llama()
    assert uncompiled(model, "model") is model
    assert uncompiled("name/of-a-model", "model") == "name/of-a-model"
    assert not caplog.records
