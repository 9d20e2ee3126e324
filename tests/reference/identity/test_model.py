from __future__ import annotations

import contextlib
import json
import time

import pytest
import torch
from torch import nn

from dpofast.errors import ModelError, ReferenceStoreError
from dpofast.reference.identity.description import ReferenceIdentity
from dpofast.reference.identity.model import current_identity, model_identity
from dpofast.reference.identity.options import scoring_options
from dpofast.reference.identity.weights import read_weights
from tests.support import tiny_llama


def identify(model, **options):
    return model_identity(
        model, **{"autocast_dtype": None, "attention": "sdpa", "head_version": 1, **options}
    )


def digest(model, **options):
    return identify(model, **options).digest


def test_the_same_weights_are_the_same_reference_in_memory_and_loaded(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert identify(loaded) == identify(model)
    loaded.config.use_cache = False
    loaded.config.pad_token_id = 7
    loaded.config.attention_dropout = 0.3
    loaded.train().requires_grad_(False)
    assert identify(loaded) == identify(model)


def test_the_order_in_which_a_class_names_its_parts_changes_nothing():
    model, other = tiny_llama(), tiny_llama()
    layer = other.model.layers[0]
    other.model._modules = dict(reversed(other.model._modules.items()))
    layer._modules = dict(reversed(layer._modules.items()))
    assert list(dict(model.named_parameters())) != list(dict(other.named_parameters()))
    assert digest(other) == digest(model)


def test_tied_weights_count_like_equal_ones():
    tied = tiny_llama(tie_word_embeddings=True)
    untied = tiny_llama()
    untied.load_state_dict(tied.state_dict())
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    assert identify(tied) == identify(untied)


def flip_a_byte(model):
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.detach().view(torch.uint8)[3, 5] ^= 1


def swap_two_layers(model):
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]


CHANGES = {
    "one bit": flip_a_byte,
    "layers swapped": swap_two_layers,
    "dtype": lambda model: model.bfloat16(),
    "rope": lambda model: model.config.rope_parameters.update(rope_theta=5e5),
    "eps": lambda model: setattr(model.config, "rms_norm_eps", 1e-5),
    "softcap": lambda model: setattr(model.config, "final_logit_softcapping", 30.0),
    "sliding window": lambda model: setattr(model.config, "sliding_window", 8),
    "an option not known yet": lambda model: setattr(model.config, "some_scale", 2.0),
    "a buffer": lambda model: model.lm_head.register_buffer("scale", torch.ones(())),
    "a name": lambda model: model.add_module("head_2", model._modules.pop("lm_head")),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_changes_a_log_prob_makes_another_reference(change):
    model = tiny_llama()
    before = digest(model)
    change(model)
    assert digest(model) != before


CHANGES_UNSEEN = {
    "data": lambda weight: weight.data.mul_(2.0),
    "numpy": lambda weight: weight.detach().numpy().__imul__(2.0),
}


@pytest.mark.parametrize("change", CHANGES_UNSEEN.values(), ids=CHANGES_UNSEEN)
def test_weights_changed_behind_the_back_of_pytorch_are_another_reference(change):
    """This is why no digest is remembered: only the bytes show such a change."""
    model = tiny_llama()
    weight = model.lm_head.weight
    before, seen = digest(model), (weight._version, weight.data_ptr())
    change(weight)
    assert (weight._version, weight.data_ptr()) == seen
    assert digest(model) != before


@pytest.mark.slow  # a gigabyte
def test_a_large_tensor_is_hashed_about_as_fast_as_memory_is_read():
    weight = nn.Linear(1 << 14, 1 << 14, bias=False)

    def seconds(work):
        times = []
        for _ in range(5):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        return min(times)

    reading = seconds(weight.weight.sum)
    hashing = seconds(lambda: read_weights(weight, None, None))
    casting = seconds(lambda: read_weights(weight, torch.bfloat16, None))
    assert hashing < 3 * reading  # 1.1 on a machine with nothing else to do
    assert casting < 6 * reading  # 1.7


@pytest.mark.parametrize(
    "options",
    [
        {"autocast_dtype": torch.bfloat16},
        {"attention": "eager"},
        {"head_version": 2},
        {"rope_depends_on_length": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_how_the_model_scores_is_part_of_the_identity(options):
    assert digest(tiny_llama(), **options) != digest(tiny_llama())


def test_a_scoring_dtype_counts_like_weights_cast_to_it():
    in_bf16 = tiny_llama()
    for parameter in in_bf16.parameters():
        parameter.data = parameter.data.bfloat16()
    assert digest(tiny_llama(), scoring_dtype=torch.bfloat16) == digest(in_bf16)


def test_a_cast_that_rounds_an_unsaved_buffer_counts():
    loaded, cast = tiny_llama(), tiny_llama().bfloat16()
    for parameter in loaded.parameters():
        parameter.data = parameter.data.bfloat16()
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    assert digest(loaded) != digest(cast)


@pytest.mark.parametrize("chunk", [1, 7, 32, 100, 259, 1 << 14])  # the head's weight is [259, 32]
def test_large_tensors_are_hashed_in_chunks_whatever_their_strides(monkeypatch, chunk):
    model = tiny_llama()
    before = digest(model)
    monkeypatch.setattr("dpofast.reference.identity.weights.CHUNK_ELEMENTS", chunk)
    model.lm_head.weight.data = model.lm_head.weight.data.t().contiguous().t()
    assert not model.lm_head.weight.is_contiguous()
    chunked = digest(model)
    monkeypatch.undo()
    assert chunked == before


def test_a_sharded_tensor_is_refused_without_gather_and_put_together_with_it():
    model = tiny_llama()
    before = digest(model)
    whole = model.lm_head.weight.data
    model.lm_head.weight.ds_id = 3  # DeepSpeed's mark of a sharded parameter
    model.lm_head.weight.data = torch.empty(0)
    with pytest.raises(ModelError, match=r"lm_head.weight is not whole"):
        digest(model)

    @contextlib.contextmanager
    def gather(tensor):
        yield whole if hasattr(tensor, "ds_id") else tensor

    assert digest(model, gather=gather) == before


def test_an_unloaded_tensor_is_refused():
    with pytest.raises(ModelError, match="not loaded"):
        digest(tiny_llama().to("meta"))


def test_a_digest_belongs_to_its_description_also_after_json():
    identity = identify(tiny_llama())
    text = json.dumps(identity.description)
    assert ReferenceIdentity(identity.digest, json.loads(text)) == identity
    with pytest.raises(ReferenceStoreError, match="does not belong"):
        ReferenceIdentity(identity.digest, {**identity.description, "attention": "eager"})
    with pytest.raises(ReferenceStoreError, match="does not belong"):
        ReferenceIdentity("../" * 8, identity.description)


def test_options_that_cannot_matter_are_left_out_of_nested_configs_too():
    options = {"text_config": {"hidden_size": 8, "resid_pdrop": 0.1, "_name_or_path": "x"}}
    assert scoring_options(options) == {"text_config": {"hidden_size": 8}}


class TestAdapters:
    @pytest.fixture(autouse=True)
    def peft(self):
        self.peft = pytest.importorskip("peft", reason="needs the extra `peft`")

    def wrap(self, model=None, **options):
        config = self.peft.LoraConfig(**{"target_modules": ["q_proj"], **options})
        return self.peft.get_peft_model(model or tiny_llama(), config)

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
            {"modules_to_save": ["lm_head"]},
            {"lora_bias": True},
            {"use_rslora": True, "lora_dropout": 0.2},
        ],
        ids=lambda options: ",".join(options) or "plain",
    )
    def test_a_fresh_adapter_is_the_model_below_it(self, options):
        assert identify(self.wrap(**options)) == identify(tiny_llama())

    def test_a_fresh_adapter_on_tied_embeddings_too(self):
        model = tiny_llama(tie_word_embeddings=True)
        before = identify(model)
        assert identify(self.wrap(model, target_modules=["q_proj", "embed_tokens"])) == before

    @pytest.mark.parametrize(
        "options",
        [
            {"init_lora_weights": False},
            {"use_dora": True},
            {"init_lora_weights": False, "target_modules": ["embed_tokens"]},
        ],
        ids=["not zero", "DoRA", "embedding"],
    )
    def test_an_adapter_that_contributes_is_part_of_the_reference(self, options):
        model = self.wrap(**options)
        assert digest(model) != digest(tiny_llama())
        with model.disable_adapter():
            assert identify(model) == identify(tiny_llama())

    def test_each_part_of_a_trained_adapter_counts(self):
        model = self.wrap(init_lora_weights=False)
        layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
        seen = {digest(model)}
        for tensor in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
            tensor.data[0, 0] += 1
            seen.add(digest(model))
        layer.scaling["default"] *= 2
        seen.add(digest(model))
        assert len(seen) == 4

    def test_a_trained_copy_of_a_module_counts_as_that_module(self):
        model = self.wrap(modules_to_save=["lm_head"])
        copy = model.base_model.model.lm_head.modules_to_save["default"]
        copy.weight.data[0, 0] += 1
        plain = tiny_llama()
        plain.lm_head.weight.data[0, 0] += 1
        assert identify(model) == identify(plain)

    def test_a_trained_adapter_is_the_same_saved_and_loaded_under_another_name(self, tmp_path):
        model = self.wrap(init_lora_weights=False)
        model.save_pretrained(tmp_path)
        load = self.peft.PeftModel.from_pretrained
        assert identify(load(tiny_llama(), tmp_path)) == identify(model)
        other = load(tiny_llama(), tmp_path, adapter_name="mine", is_trainable=True)
        assert identify(other) == identify(model)

    def test_a_merged_adapter_is_a_model_with_those_weights(self):
        model = self.wrap(init_lora_weights=False)
        model.merge_adapter()
        merged = identify(model)
        assert merged != identify(tiny_llama())
        assert identify(model.unload()) == merged  # this leaves the weights unchanged
        model = self.wrap(init_lora_weights=False)
        model.merge_adapter()
        with model.disable_adapter(), pytest.raises(ModelError, match="unmerge"):
            digest(model)

    def test_other_kinds_of_adapters_never_count_as_the_base_model(self):
        for config in (
            self.peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
            self.peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 4]),
        ):
            model = self.peft.get_peft_model(tiny_llama(), config)
            assert digest(model) not in (digest(tiny_llama()), digest(self.wrap()))
            assert digest(model) == digest(model)

    def test_an_adapter_of_virtual_tokens_is_refused(self):
        config = self.peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        with pytest.raises(ModelError, match="LoRA"):
            digest(self.peft.get_peft_model(tiny_llama(), config))


def test_an_older_identity_is_brought_up_to_date_only_if_rope_depends_on_lengths():
    older = identify(tiny_llama())
    assert current_identity(older, rope_depends_on_length=False) is older
    today = identify(tiny_llama(), rope_depends_on_length=True)
    assert current_identity(older, rope_depends_on_length=True) == today
    assert current_identity(today, rope_depends_on_length=True) == today
    assert "rope_length_from" not in older.description
