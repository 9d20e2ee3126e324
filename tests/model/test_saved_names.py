"""Names and shapes of saved tensors, against those that from_pretrained expects."""

from __future__ import annotations

import json
import logging

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations

from dpofast.model.saved_names import (
    NameDifference,
    difference_in_files,
    difference_in_memory,
    saved_shapes,
)
from tests.families import FAMILIES, tiny_model
from tests.support import tiny_llama

LOGGER = "dpofast.model.saved_names"
GATE = "model.layers.0.mlp.gate_proj.weight"


def own_records(caplog):
    return [record for record in caplog.records if record.name == LOGGER]


def check_family(model, folder, caplog):
    """A saved model has no difference, and one without a tensor is found out."""
    caplog.set_level(logging.DEBUG, logger=LOGGER)
    model.save_pretrained(folder)
    assert difference_in_memory(model) == NameDifference()
    assert difference_in_files(folder, model) == NameDifference()
    file = folder / "model.safetensors"
    tensors = load_file(file)
    single = sorted(name for name in tensors if "expert" not in name)
    del tensors[single[len(single) // 2]]
    save_file({**tensors, "other.weight": torch.zeros(2)}, file, metadata={"format": "pt"})
    found = difference_in_files(folder, model)
    assert found.is_harmful
    assert "other.weight" in found.unknown
    assert not own_records(caplog)  # which would say that something couldn't be compared


# Plain, tied, experts that are saved one by one, layers that differ, and a state.
SOME = ["llama", "gemma2", "mixtral", "gemma4", "mamba"]


@pytest.mark.parametrize("family", SOME)
def test_a_saved_model_has_the_tensors_that_are_expected(tmp_path, caplog, family):
    check_family(tiny_model(family), tmp_path, caplog)


@pytest.mark.slow  # a model of every family
@pytest.mark.parametrize("family", FAMILIES)
def test_so_has_one_of_every_family(tmp_path, caplog, family):
    check_family(tiny_model(family), tmp_path, caplog)


def test_an_expert_without_a_part_could_not_be_put_together(tmp_path):
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors[next(name for name in tensors if ".experts.2." in name)]
    save_file(tensors, file, metadata={"format": "pt"})
    assert difference_in_files(tmp_path, model).is_harmful


def test_files_of_several_shards_are_read_by_their_index(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    assert saved_shapes(tmp_path) == expected
    assert not difference_in_files(tmp_path, model)


def test_a_folder_without_weights_has_nothing_to_compare(tmp_path):
    assert saved_shapes(tmp_path) is None
    assert not difference_in_files(tmp_path, tiny_llama())


def without_a_layer(model):
    model.model.layers = model.model.layers[:1]


def with_another_embedding(model):
    model.set_input_embeddings(nn.Embedding(300, 32))


def parametrised(model):
    parametrizations.weight_norm(model.model.layers[0].mlp.gate_proj)


def tied_by_hand(model):
    model.lm_head.weight = model.model.embed_tokens.weight


def wrapped(model):
    model.model.layers[1] = nn.Sequential(model.model.layers[1])


HARMFUL = {
    without_a_layer: "9 missing (model.layers.1.input_layernorm.weight, ",
    with_another_embedding: "1 of another shape (model.embed_tokens.weight)",
    parametrised: f"1 missing ({GATE}); 2 not known to it (",
    tied_by_hand: "2 tied to each other without a word in the config (lm_head.weight, model.embed",
    wrapped: "9 missing (model.layers.1.input_layernorm.weight, ",
}


@pytest.mark.parametrize("change", HARMFUL)
def test_changes_that_the_config_does_not_know(change):
    model = tiny_llama()
    change(model)
    found = difference_in_memory(model)
    assert found.is_harmful
    assert str(found).startswith(HARMFUL[change])


def test_changes_that_load_again():
    resized = tiny_llama()
    resized.resize_token_embeddings(300)
    assert not difference_in_memory(resized)
    tied = tiny_llama(tie_word_embeddings=True)
    assert not difference_in_memory(tied)
    more = tiny_llama()
    more.value_head = nn.Linear(4, 4)
    found = difference_in_memory(more)
    assert found
    assert not found.is_harmful
    assert str(found) == "2 not known to it (value_head.bias, value_head.weight)"


ADAPTERS = {
    "lora": peft.LoraConfig(r=2, target_modules=["q_proj"]),
    "modules to save": peft.LoraConfig(
        r=2, target_modules="all-linear", modules_to_save=["embed_tokens"]
    ),
    "by the weights": peft.LoraConfig(
        r=2, target_modules=["q_proj"], init_lora_weights="pissa_niter_2"
    ),
    "dora": peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
    "ia3": peft.IA3Config(task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters(tmp_path, caplog, kind):
    caplog.set_level(logging.DEBUG, logger=LOGGER)
    model = peft.get_peft_model(tiny_llama(), ADAPTERS[kind])
    assert difference_in_memory(model) == NameDifference()
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert difference_in_files(tmp_path, model) == NameDifference()
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    first, *_ = sorted(tensors)
    renamed = {name.replace(first, f"_wrapped.{first}"): t for name, t in tensors.items()}
    save_file(renamed, file, metadata={"format": "pt"})
    assert difference_in_files(tmp_path, model).missing == [first]
    assert not own_records(caplog)


def test_a_second_adapter_is_in_a_folder_of_its_own(tmp_path):
    model = peft.get_peft_model(tiny_llama(), ADAPTERS["lora"])
    model.add_adapter("other", ADAPTERS["dora"])
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert not difference_in_files(tmp_path, model)
    (tmp_path / "other" / "adapter_model.safetensors").write_bytes(
        (tmp_path / "adapter_model.safetensors").read_bytes()
    )
    assert difference_in_files(tmp_path, model).is_harmful


def test_an_embedding_that_is_saved_beside_an_adapter_is_no_difference(tmp_path):
    model = peft.get_peft_model(tiny_llama(), ADAPTERS["lora"])
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert not difference_in_files(tmp_path, model)


def test_a_model_that_cannot_be_built_again_is_not_compared(caplog):
    caplog.set_level(logging.WARNING, logger=LOGGER)

    class Own(type(tiny_llama())):
        def __init__(self, config, more):
            super().__init__(config)

    assert not difference_in_memory(Own(tiny_llama().config, 1))
    assert [record.levelname for record in own_records(caplog)] == ["WARNING"]


def test_no_random_numbers_are_drawn():
    model = tiny_llama()
    before = torch.get_rng_state()
    difference_in_memory(model)
    assert torch.equal(before, torch.get_rng_state())
