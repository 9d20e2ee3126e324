"""With its dropouts and noise switched off, a model in training mode equals itself in eval mode."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from dpofast.model.dropout import disable_dropout, dropouts
from dpofast.model.packable import why_not_packed
from dpofast.model.randomness import random_modules
from tests.families import BASE, EXPERTS, FAMILIES, MULTI_HEAD, SIZES, tiny_model

INPUT_IDS = torch.tensor([[5, 7, 11, 13, 17, 19, 23]] * 3)
PHIMOE = {**BASE, **EXPERTS, "pad_token_id": 0}
FALCON = {**SIZES, "num_hidden_layers": 2, "num_attention_heads": 4}
DBRX: dict[str, Any] = {
    **{"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": 97},
    "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
    "ffn_config": {
        **{"ffn_hidden_size": 48, "hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        **{"moe_jitter_eps": 0.01, "moe_loss_weight": 0.0},
    },
}
# Name: (class of the config, its fields, type of a module that is random).
NOISY = {
    "a router's factor": ("DbrxConfig", DBRX, "DbrxRouter"),
    "drawn experts": ("PhimoeConfig", PHIMOE, "PhimoeTopKRouter"),
    "drawn experts and a factor": (
        "PhimoeConfig",
        {**PHIMOE, "input_jitter_noise": 0.1},
        "PhimoeSparseMoeBlock",
    ),
    "a number in the config": ("FalconConfig", {**FALCON, "hidden_dropout": 0.2}, "FalconDecoder"),
    "two numbers in the config": (
        "FalconConfig",
        {**FALCON, "hidden_dropout": 0.2, "attention_dropout": 0.2, "parallel_attn": False},
        "FalconDecoderLayer",
    ),
    "a number and a layer": (
        "PersimmonConfig",
        {**MULTI_HEAD, "attention_dropout": 0.2, "hidden_dropout": 0.0},
        "PersimmonAttention",
    ),
    "left-out layers": (
        "OPTConfig",
        {**MULTI_HEAD, "ffn_dim": 48, "dropout": 0.0, "word_embed_proj_dim": 32, "layerdrop": 0.5},
        "OPTDecoder",
    ),
}


def noisy_model(name):
    """In training mode, with weights large enough for every part to matter."""
    class_name, fields, _ = NOISY[name]
    torch.manual_seed(0)
    config = getattr(transformers, class_name)(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.train()


def logits(model):
    with torch.no_grad():
        return model(INPUT_IDS, use_cache=False).logits


@pytest.mark.parametrize("name", NOISY)
def test_noise_is_found_and_switched_off(name):
    model = noisy_model(name)
    fields = copy.deepcopy(model.config.to_dict())
    assert not torch.equal(logits(model), logits(model))
    assert why_not_packed(model) is not None
    found = {type(module).__name__ for module, _ in dropouts(model)}
    assert any(kind.startswith(NOISY[name][2]) for kind in found)
    disable_dropout(model)
    assert not list(dropouts(model))
    assert not random_modules(model)
    in_training = logits(model)
    assert all(module.training for module in model.modules()), "every module keeps its mode"
    assert torch.equal(in_training, logits(model.eval()))
    assert model.config.to_dict() == fields


@pytest.mark.slow  # a model of every family
@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_is_random_once_its_dropouts_are_off(family):
    """With every rate in its config above 0; a new version of transformers can have new ones."""
    class_name, fields = FAMILIES[family]
    if not hasattr(transformers, class_name):
        pytest.skip(f"transformers {transformers.__version__} is older than {family}")
    known = tiny_model(family).config.to_dict()
    rates = {
        name: 0.3
        for name, value in known.items()
        if isinstance(value, float) and any(part in name for part in ("drop", "jitter", "noise"))
    }
    if family == "diffllama":
        del rates["attention_dropout"]  # refused by the model itself
    config = getattr(transformers, class_name)(**{**fields, **rates})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    disable_dropout(model.train())
    assert not random_modules(model)
    in_training = logits(model)
    torch.testing.assert_close(in_training, logits(model.eval()), rtol=0, atol=0)


def test_a_checkpointed_layer_without_noise_is_still_checkpointed():
    """Its gradients are those of eval mode, and the layer runs a second time in the backward."""
    model = noisy_model("two numbers in the config")
    disable_dropout(model)
    model(INPUT_IDS, use_cache=False).logits.square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    runs = []
    model.transformer.h[0].self_attention.register_forward_pre_hook(lambda *_: runs.append(1))
    model(INPUT_IDS, use_cache=False).logits.square().mean().backward()
    assert len(runs) == 2
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name])


def test_a_copy_of_a_quiet_model_is_quiet():
    model = noisy_model("drawn experts")
    disable_dropout(model)
    twin = copy.deepcopy(model)
    disable_dropout(twin)  # changes nothing
    assert torch.equal(logits(twin), logits(model))


def test_a_quiet_modules_mode_survives_an_error_in_its_forward():
    model = noisy_model("drawn experts")
    disable_dropout(model)
    router = model.model.layers[0].mlp.router
    with pytest.raises(RuntimeError):
        router(torch.zeros(2, 3))
    assert router.training


def test_the_best_experts_have_the_gradient_that_a_draw_of_them_has(monkeypatch):
    """Eval mode computes PhiMoE's function without the noise, and its estimate of the gradient."""
    router = noisy_model("drawn experts").double().model.layers[0].mlp.router
    states = torch.randn(7, 32, dtype=torch.float64)
    goal = torch.randn(7, 2, dtype=torch.float64)
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda tensor: tensor.fill_(1.0))
    found = []
    for mode in (True, False):
        router.train(mode).zero_grad()
        _, weights, experts = router(states)
        (weights * goal).sum().backward()
        found.append((weights.detach(), experts, router.weight.grad))
    (weights, experts, gradient), (best_weights, best, best_gradient) = found
    assert torch.equal(experts, best)
    torch.testing.assert_close(weights, best_weights, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, best_gradient, rtol=1e-10, atol=1e-14)
