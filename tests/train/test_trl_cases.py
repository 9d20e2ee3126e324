"""Cases of TRL's own tests for which no other file here has a test of the same intent."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from datasets import DatasetDict, IterableDatasetDict

from dpofast import DPOTrainer
from dpofast.errors import ConfigError, ModelError
from tests.families import VOCAB_SIZE, tiny_model
from tests.support import byte_tokenizer, make_trainer, tiny_llama, token_pairs

REMOTE_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class RemoteConfig(LlamaConfig):
    model_type = "remote"

class RemoteForCausalLM(LlamaForCausalLM):
    config_class = RemoteConfig
"""


# Families whose layers are compared with separate sequences in tests/model.
COMPARED = ("cohere2", "glm4_moe", "gpt_oss", "olmo3", "qwen3_moe")


@pytest.mark.parametrize(
    "family",
    ["lfm2", "nemotron_h", *(pytest.param(name, marks=pytest.mark.slow) for name in COMPARED)],
)
def test_every_parameter_of_a_family_moves(tmp_path, family):
    model = tiny_model(family)
    before = {name: value.clone() for name, value in model.named_parameters()}
    options = {"max_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 4}
    make_trainer(tmp_path, model, token_pairs(8, vocab_size=VOCAB_SIZE), options=options).train()
    same = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    assert not same
    assert len(before) > 5


@pytest.mark.parametrize("is_wrapped", [False, True], ids=["peft_config", "PeftModel"])
def test_adapters_on_experts_move_and_nothing_below_them(tmp_path, is_wrapped):
    peft = pytest.importorskip("peft", reason="needs the extra `peft`")
    config = peft.LoraConfig(
        target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    )
    model = tiny_model("gpt_oss")
    base = {name: value.clone() for name, value in model.named_parameters()}
    arguments = {} if is_wrapped else {"peft_config": config}
    trainer = make_trainer(
        tmp_path,
        peft.get_peft_model(model, config) if is_wrapped else model,
        token_pairs(8, vocab_size=VOCAB_SIZE),
        options={"max_steps": 3, "learning_rate": 1e-1, "router_aux_loss_coef": 0.0},
        **arguments,
    )
    adapter = {n: p.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert trainer.first_loss == pytest.approx(math.log(2), abs=1e-5)
    trained = dict(trainer.model.named_parameters())
    assert len(adapter) == 12
    assert not [name for name, value in adapter.items() if torch.equal(trained[name], value)]
    below = trainer.model.unload()
    assert all(torch.equal(value, base[name]) for name, value in below.named_parameters())


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_weights_keep_the_dtype_in_which_they_are_loaded(tmp_path, model_folder):
    # AdamW's usual epsilon is 0 in float16, and 0 / 0 is NaN.
    options = {
        "model_init_kwargs": {"dtype": torch.float16},
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-4,
    }
    trainer = make_trainer(tmp_path, str(model_folder), options=options)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    for name, value in trainer.model.named_parameters():
        assert value.dtype == torch.float16
        assert not torch.equal(value, before[name]), name


def test_code_of_a_repository_runs_only_if_it_is_trusted(tmp_path, model_folder):
    config = model_folder / "config.json"
    remote = '"auto_map": {"AutoConfig": "remote.RemoteConfig", '
    remote += '"AutoModelForCausalLM": "remote.RemoteForCausalLM"}, "model_type": "remote"'
    text = config.read_text().replace('"model_type": "llama"', remote)
    config.write_text(text.replace("LlamaForCausalLM", "RemoteForCausalLM"))
    (model_folder / "remote.py").write_text(REMOTE_CODE)
    with pytest.raises(ModelError, match="trust_remote_code"):
        make_trainer(tmp_path, str(model_folder))
    trainer = make_trainer(tmp_path, str(model_folder), options={"trust_remote_code": True})
    assert type(trainer.model).__name__ == "RemoteForCausalLM"


@pytest.mark.parametrize("container", [dict, DatasetDict, IterableDatasetDict])
def test_several_sets_are_evaluated_from_any_container(tmp_path, container):
    sets = {"one": token_pairs(3, seed=4), "two": token_pairs(2, seed=5)}
    if container is IterableDatasetDict:
        sets = {name: pairs.to_iterable_dataset() for name, pairs in sets.items()}
    given = container(sets)
    before = make_trainer(tmp_path).evaluate(given)
    trainer = make_trainer(tmp_path, eval_dataset=given, options={"max_steps": 1})
    assert trainer.eval_dataset.keys() == given.keys()
    trainer.train()
    after = trainer.evaluate()
    for name in ("eval_one_loss", "eval_two_loss"):
        assert before[name] == pytest.approx(math.log(2), abs=1e-5)
        assert after[name] != before[name]


def test_training_needs_a_training_dataset(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=token_pairs(2))
    without = DPOTrainer(
        copy.deepcopy(trainer.model), args=trainer.args, processing_class=byte_tokenizer()
    )
    with pytest.raises(ConfigError, match=r"train\(\) needs a train_dataset"):
        without.train()
