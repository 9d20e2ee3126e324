"""Quantised layers: which are taken, and how a model with them is run and measured."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dpofast.errors import ConfigError, ModelError
from dpofast.model.flops import TrainingFlops
from dpofast.model.forward import evaluating
from dpofast.model.load import load_policy
from dpofast.model.parts import num_bytes, numel, shape
from dpofast.model.quantised import (
    ADAPTERS,
    check_trainable,
    computing_dtype,
    keep_differentiable,
    quantised_layers,
)
from tests.quantised import KINDS, adapter, load, repacks_on_this_machine, save_base
from tests.support import tiny_llama

peft = pytest.importorskip("peft", reason="needs the extra `peft`")
IDS = torch.tensor([[5, 9, 2, 77, 30]])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


def gradients(model):
    """Loss and gradients of a step; the adapter has other weights than those of a fresh one."""
    model.train().zero_grad()
    loss = model(IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    return [loss, *(torch.zeros(()) if p.grad is None else p.grad.clone() for p in trained)]


def with_adapter(model):
    torch.manual_seed(0)
    return peft.get_peft_model(model, adapter(init_lora_weights=False))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_same_after_a_pass_in_eval_mode(base, kind):
    model = with_adapter(load(base, kind))
    keep_differentiable(model)
    before = gradients(model)
    model.eval()
    with torch.no_grad():
        model(IDS)
    model.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert all(map(torch.equal, gradients(model), before))
    assert all(gradient.any() for gradient in before)


@pytest.mark.skipif(not repacks_on_this_machine(), reason="this CPU has no AVX512-BF16")
def test_without_that_bitsandbytes_cuts_gradients_off(tmp_path):
    """If this fails, `keep_differentiable` isn't needed any more, or sets another attribute."""
    model = with_adapter(load(save_base(tmp_path, attention_bias=False), "nf4"))
    assert all(gradient.any() for gradient in gradients(model))
    model.eval()
    with torch.no_grad():
        model(IDS)
    assert not all(gradient.any() for gradient in gradients(model))
    with pytest.raises(ModelError, match="repacked this 4-bit weight"):
        keep_differentiable(model)


@pytest.mark.parametrize("kind", ["nf4", "8bit"])
def test_evaluating_computes_what_a_step_computes(base, kind):
    model = with_adapter(load(base, kind))
    trained = model.train()(IDS).logits
    modes = [module.training for module in model.modules()]
    with evaluating(model):
        assert torch.equal(model(IDS).logits, trained)
    assert [module.training for module in model.modules()] == modes
    if kind == "8bit":  # plain eval mode rounds the inputs to int8
        with torch.no_grad():
            assert not torch.allclose(model.eval()(IDS).logits, trained, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_those_before_quantising_and_bytes_those_after(base, kind):
    plain, model = load_policy(str(base)), load(base, kind)
    assert len(quantised_layers(model)) == 14
    weights = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        assert (numel(weights[name]), shape(weights[name])) == (numel(parameter), parameter.shape)
    weight = weights["model.layers.0.mlp.up_proj.weight"]
    assert num_bytes(weight) == 64 * 128 // (1 if kind == "8bit" else 2)
    model.requires_grad_(False)
    plain.requires_grad_(False)
    assert TrainingFlops(model).per_token == TrainingFlops(plain).per_token > 0


def test_tolerances_go_by_the_coarsest_dtype(base):
    assert computing_dtype(load(base, "nf4")) == torch.float32
    coarse = load(base, "nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    assert computing_dtype(coarse) == torch.bfloat16
    assert computing_dtype(load(base, "8bit")) == torch.float32  # on a CPU
    assert computing_dtype(tiny_llama().half()) == torch.float16


def test_layers_that_are_not_quantised_yet_are_refused():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for layer in (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt):
        more = {"has_fp16_weights": False} if layer is bitsandbytes.nn.Linear8bitLt else {}
        model = tiny_llama(hidden_size=64, intermediate_size=128)
        model.model.layers[0].mlp.up_proj = layer(64, 128, bias=False, **more)
        with pytest.raises(ModelError, match="up_proj: this layer isn't quantised yet"):
            keep_differentiable(model)


@pytest.mark.parametrize("config", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "fp8"}])
def test_other_tools_are_refused_by_name(config):
    model = tiny_llama()
    model.is_quantized = True
    model.config.quantization_config = config
    with pytest.raises(ModelError, match=f"quantised by {config['quant_method']}, but only"):
        keep_differentiable(model)


def test_zero3_and_full_training_are_refused(base):
    with pytest.raises(ModelError, match="train an adapter"):
        check_trainable(load(base, "nf4"), None)
    model = with_adapter(load(base, "nf4"))
    check_trainable(model, 2)
    with pytest.raises(ConfigError, match="use zero2"):
        check_trainable(model, 3)
    check_trainable(tiny_llama(), 3)


def test_dora_on_8_bit_layers_is_refused_on_a_cpu(base):
    for kind in ("nf4", "8bit"):
        model = peft.get_peft_model(load(base, kind), adapter(use_dora=True))
        if kind == "nf4":
            check_trainable(model, None)
            continue
        with pytest.raises(ConfigError, match="DoRA on 8-bit layers fails on a CPU"):
            check_trainable(model, None)
        model.train()(IDS)
        with pytest.raises(AttributeError):  # if this passes, peft has mended it
            model(IDS)


def adapters():
    """A config of each kind of adapter that is trained on quantised layers, by its folder."""
    layers = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
    one_size = {"target_modules": ["q_proj", "o_proj"]}
    return {
        "lora": adapter(use_rslora=True),
        "adalora": peft.AdaLoraConfig(total_step=9, tinit=1, tfinal=2, **layers),
        "boft": peft.BOFTConfig(boft_block_size=4, **layers),
        "fourierft": peft.FourierFTConfig(n_frequency=50, **one_size),
        "ia3": peft.IA3Config(feedforward_modules=["down_proj"], **layers),
        "miss": peft.MissConfig(r=8, **layers),
        "oft": peft.OFTConfig(oft_block_size=8, **layers),
        "randlora": peft.RandLoraConfig(r=4, **layers),
        "road": peft.RoadConfig(group_size=8, **layers),
        "shira": peft.ShiraConfig(r=4, **layers),
        "vera": peft.VeraConfig(r=4, **one_size),
        "waveft": peft.WaveFTConfig(n_frequency=50, **one_size),
    }


def test_every_kind_of_adapter_is_compared():
    assert list(adapters()) == list(ADAPTERS)


@pytest.mark.slow  # each case loads two models
@pytest.mark.parametrize("kind", ["nested", "8bit"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_these_adapters_compute_what_they_do_on_dequantised_layers(base, kind, name):
    found = []
    for is_quantised in (True, False):
        model = load(base, kind)
        model = model if is_quantised else model.dequantize(dtype=torch.float32)
        torch.manual_seed(0)
        model = peft.get_peft_model(model, adapters()[name])
        torch.manual_seed(0)
        for parameter in model.parameters():  # a fresh one may change nothing
            if parameter.requires_grad:
                parameter.data += 0.01 * torch.randn(parameter.shape)
        keep_differentiable(model)
        check_trainable(model, None)
        found.append(gradients(model))
    assert any(part.any() for part in found[0][1:])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)


def test_adapters_that_misread_quantised_weights_are_refused(base):
    layers = {"r": 4, "target_modules": ["q_proj"]}
    for kind, config in (("8bit", peft.HRAConfig(**layers)), ("nf4", peft.LoHaConfig(**layers))):
        model = peft.get_peft_model(load(base, kind), config)
        name = config.peft_type.value.lower()
        with pytest.raises(ConfigError, match=f"peft.tuners.{name} aren't supported on quantised"):
            check_trainable(model, None)


def test_weights_that_are_stored_in_other_bits_than_asked_for_are_refused(tmp_path, base):
    load(base, "nested").save_pretrained(tmp_path)
    model = load_policy(str(tmp_path), quantization_config={"load_in_4bit": True})
    assert quantised_layers(model)
    with pytest.raises(ConfigError, match="are stored in 4 bits, and can't be quantised otherwise"):
        load_policy(str(tmp_path), quantization_config={"load_in_8bit": True})


def test_plain_models_are_left_as_they_are():
    model = tiny_llama()
    keep_differentiable(model)
    assert not quantised_layers(model)
    assert not quantised_layers(nn.Linear(2, 2))
