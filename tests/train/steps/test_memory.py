"""Bytes that autograd keeps for a row, and numbers of tokens that fit free memory."""

from __future__ import annotations

import contextlib
import functools
import logging

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import Qwen3_5ForCausalLM

from dpofast import DPOConfig
from dpofast.data.packing.collate import Layout
from dpofast.model.forward import micro_batch, run_body
from dpofast.train.steps import memory
from dpofast.train.steps.memory import row_bytes, tokens_that_fit, training_bytes
from tests.families import tiny_model
from tests.support import tiny_llama

GB = 10**9


def config(tmp_path, **options):
    given = {"bf16": False, "gradient_checkpointing": False, "use_cpu": True, **options}
    return DPOConfig(output_dir=str(tmp_path), **given)


def per_token(model, made, layout="shared"):
    return row_bytes(model, Layout(layout), made, contextlib.nullcontext).per_token


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "gpt_oss", "opt"])
def test_a_token_costs_the_same_whatever_the_parameters(tmp_path, family):
    """Parameters must not count as bytes that grow with the row; half of their bytes would show."""
    model = tiny_model(family)
    cost = per_token(model, config(tmp_path))
    assert 1000 < cost < 100_000
    model.get_input_embeddings().weight.requires_grad_(False)
    assert per_token(model, config(tmp_path)) == pytest.approx(cost, rel=0.1)


def test_by_hand_for_a_llama_layer(tmp_path):
    """The bytes of a layer agree within a fifth with those that its operations need."""
    model = tiny_llama(num_hidden_layers=4)
    hidden, inner, kv = 32, 48, 16
    norms = 2 * (2 * hidden)  # both norms of a layer keep their input and its normalised form
    rotated, gathered = 2 * (hidden + kv), 2 * (kv + kv)  # q and k; k and v
    attention = rotated + gathered + 2 * hidden  # and the output
    mlp = 4 * inner  # gate, its activation, up, and their product
    by_hand = 4 * (norms + attention + mlp)
    four, two = (
        per_token(tiny_llama(num_hidden_layers=count), config(tmp_path)) for count in (4, 2)
    )
    assert (four - two) / 2 == pytest.approx(by_hand, rel=0.2)
    assert per_token(model.double(), config(tmp_path)) > 1.8 * four


def test_checkpointing_keeps_the_inputs_of_its_layers(tmp_path):
    model = tiny_llama(num_hidden_layers=8)
    whole = per_token(model, config(tmp_path))
    checkpointed = per_token(model, config(tmp_path, gradient_checkpointing=True))
    state = 32 * 4
    layer = (whole - per_token(tiny_llama(num_hidden_layers=4), config(tmp_path))) / 4
    assert checkpointed < whole / 3
    assert checkpointed == pytest.approx(whole - 7 * layer + 8 * state, rel=0.01)
    some = config(tmp_path, gradient_checkpointing=True)
    some.activation_checkpointing = True  # the option's name since transformers 5.23
    some.activation_checkpointing_kwargs = {"every_n_layers": 2}
    assert checkpointed < per_token(model, some) < whole


def kept_bytes(model, sequences):
    """Bytes of the tensors that a row keeps for its backward, and the row's tokens."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    batch = Layout("shared").collate(sequences)
    with micro_batch(model, batch), saved_tensors_hooks(keep, lambda tensor: tensor):
        states = run_body(model, batch)
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    assert states.requires_grad
    return sum(each.untyped_storage().nbytes() for each in kept.values()), batch.num_body_tokens


LENGTHS = [(150, 90, 140), (30, 200, 170), (260, 40, 75)]  # prompt, chosen, rejected
STATEFUL = ["qwen3_5", *("bamba", "kimi_linear", "lfm2", "mamba2", "olmo_hybrid", "zamba2")]


@pytest.mark.parametrize(
    "family", [pytest.param(each, marks=pytest.mark.slow) for each in STATEFUL[1:]] + STATEFUL[:1]
)
def test_layers_with_a_state_cost_what_rows_of_real_lengths_keep(tmp_path, family):
    """Parts of 12 tokens, padded to chunks of 64, would say several times as much."""
    model = tiny_model(family)
    sequences = [
        ([5] * prompt, [6 + i] * n) for prompt, *both in LENGTHS for i, n in enumerate(both)
    ]
    kept, tokens = kept_bytes(model, sequences)
    state = 2 * 32 * 4  # the gathered hidden state of a scored token, and its gradient
    cost = per_token(model, config(tmp_path)) - state
    assert 0.9 < cost / (kept / tokens) < 1.35


def test_one_checkpointed_layer_at_a_time_is_the_largest(tmp_path):
    """With a state in one layer of three or in all, that layer costs the most."""
    plain, checkpointed = config(tmp_path), config(tmp_path, gradient_checkpointing=True)
    states, attention = "linear_attention", "full_attention"
    whole, once = [], []
    for others in (states, attention):
        model_config = tiny_model("qwen3_5").config
        model_config.layer_types = [states, others, others]
        model = Qwen3_5ForCausalLM(model_config)
        whole.append(per_token(model, plain))
        once.append(per_token(model, checkpointed))
    assert whole[0] > 1.5 * whole[1]
    assert once[0] == pytest.approx(once[1], rel=0.05)


def test_weights_that_are_taken_away_after_their_layer_are_not_kept(tmp_path):
    """ZeRO-3 takes them away, so counting must not keep the weights of all layers alive."""
    model, kept = tiny_llama(num_hidden_layers=4), {}
    cost = per_token(model, config(tmp_path))
    most = [0]

    def give(module, _):
        for parameter in module.parameters():
            parameter.data = kept[parameter].clone()
            given.append(StorageWeakRef(parameter.untyped_storage()))

    def take(module, *_):
        alive = [ref for ref in given if not ref.expired()]
        most[0] = max(most[0], len(alive))
        for parameter in module.parameters():
            parameter.data = torch.empty(0)

    given: list[StorageWeakRef] = []
    for layer in model.model.layers:
        kept |= {parameter: parameter.data for parameter in layer.parameters()}
        layer.register_forward_pre_hook(give)
        layer.register_forward_hook(take)
    assert per_token(model, config(tmp_path)) == cost
    assert most[0] == len(kept) / 4


def test_adapters_and_autocast_are_counted_as_they_run(tmp_path):
    peft = pytest.importorskip("peft", reason="needs the extra `peft`")
    model = tiny_llama()
    whole = per_token(model, config(tmp_path))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert per_token(adapted, config(tmp_path)) < whole
    assert row_bytes(tiny_llama(), *autocast_run(tmp_path)).per_token < whole


def autocast_run(tmp_path, **options):
    half = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    return Layout("shared"), config(tmp_path, **options), half


@pytest.mark.parametrize("checkpointing", [False, True])
def test_autocasts_copies_of_the_weights_cost_the_same_for_all_rows(tmp_path, checkpointing):
    model = tiny_llama(num_hidden_layers=8)
    layout, made, half = autocast_run(tmp_path, gradient_checkpointing=checkpointing)
    copies = 2 * sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    assert row_bytes(model, layout, made, half).fixed == pytest.approx(copies, rel=0.1)
    assert row_bytes(model, layout, made, contextlib.nullcontext).fixed < 0.01 * copies


def test_what_all_rows_cost_is_taken_off(tmp_path, monkeypatch):
    asked = (tiny_llama(), Layout("shared"), config(tmp_path), contextlib.nullcontext)
    costs = iter([memory.RowBytes(1e5, 0.0), memory.RowBytes(1e5, GB), memory.RowBytes(1e5, GB)])
    monkeypatch.setattr(memory, "row_bytes", lambda *_: next(costs))
    before = tokens_that_fit(*asked, 2 * GB)
    assert memory.SMALLEST_ROW < before < memory.LARGEST_ROW
    assert tokens_that_fit(*asked, 3 * GB) == before < tokens_that_fit(*asked, 4 * GB)


def test_training_bytes(tmp_path):
    model = tiny_llama()
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert training_bytes(model, config(tmp_path)) == 4 * size  # weights, gradients, two moments
    model.model.requires_grad_(False)
    head = model.lm_head.weight.numel() * 4
    assert training_bytes(model, config(tmp_path)) == size + 3 * head


def test_zero_shares_states_among_ranks(tmp_path, monkeypatch):
    model, made = tiny_llama(), config(tmp_path)
    monkeypatch.setattr(type(made), "world_size", property(lambda _: 4))
    monkeypatch.setattr("dpofast.train.steps.memory.zero_stage", lambda _: (2, False))
    count = sum(parameter.numel() for parameter in model.parameters())
    two = training_bytes(model, made)
    assert two == 2 * count + int(18 * count / 4)
    monkeypatch.setattr("dpofast.train.steps.memory.zero_stage", lambda _: (3, False))
    assert training_bytes(model, made) < two
    monkeypatch.setattr("dpofast.train.steps.memory.zero_stage", lambda _: (2, True))
    assert training_bytes(model, made) == 2 * count


def test_rows_grow_with_what_is_free_and_stay_within_limits(tmp_path, caplog):
    model, layout = tiny_llama(), Layout("shared")
    made = config(tmp_path)

    def fit(free):
        return tokens_that_fit(model, layout, made, contextlib.nullcontext, free)

    cost = per_token(model, made)
    fixed = training_bytes(model, made) + 1.5 * GB + 4 * model.lm_head.weight.numel()
    half_gb = fit(fixed + 10**8)
    assert half_gb % 256 == 0
    assert half_gb == pytest.approx(0.8 * 10**8 / cost, abs=256)
    assert fit(fixed + 10**12) == 65_536
    with caplog.at_level(logging.WARNING):
        assert fit(fixed) == 512
    assert "training may run out of memory; train an adapter" in caplog.text
