"""The checks before a run: packed rows, and the attention for them on this device."""

from __future__ import annotations

import importlib

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dpofast.data.packing.collate import Layout
from dpofast.errors import ConfigError, ModelError
from dpofast.model import checks
from dpofast.model.attention import attention_calls, packed_attention
from dpofast.model.checks import check_attention, check_layout, check_rows
from dpofast.model.forward import pair_step, run_batch
from dpofast_kernels.attention import shared_attention
from tests.exactness import SHORT, compare
from tests.families import DEAF_FAMILIES, MASKED_FAMILIES, MIXING_FAMILIES, tiny_model
from tests.support import make_trainer, tiny_llama
from tests.tf32 import Tf32

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forget_what_was_probed():
    checks.probed_backend.cache_clear()
    yield
    checks.probed_backend.cache_clear()


@pytest.fixture
def probe_with(monkeypatch):
    """Lets the probe compare this function of query, key, value, layout and options with ours."""
    # the package's name `probe` is the function, not the module that holds it
    module = importlib.import_module("dpofast_kernels.attention.probe")

    def replace(attention):
        def tampered(query, key, value, layout, options):
            chosen = shared_attention if options.backend == "naive" else attention
            return chosen(query, key, value, layout, options)

        monkeypatch.setattr(module, "shared_attention", tampered)

    return replace


def run_packed(model):
    """Runs a packed micro-batch through the model's body, without plugging our attention in."""
    batch = Layout("shared").collate(SHORT.sequences)
    with pair_step(model):
        return run_batch(model, batch, lambda hidden_states, *_: hidden_states)


@pytest.mark.parametrize("given", [False, True])
def test_the_trainer_names_its_attention_once(tmp_path, caplog, given):
    caplog.set_level("INFO", logger="dpofast")
    reference = tiny_llama(seed=5) if given else None
    trainer = make_trainer(tmp_path, ref_model=reference, options={"max_steps": 2})
    trainer.train()
    lines = [record.message for record in caplog.records if "Attention:" in record.message]
    words = "Attention: sdpa (float32, 4 heads of 8); compared with its naive twin on cpu."
    assert lines == [words]


def test_a_padded_run_names_none(tmp_path, caplog):
    caplog.set_level("INFO", logger="dpofast")
    make_trainer(tmp_path, options={"max_steps": 1, "layout": "padded"}).train()
    assert not [record for record in caplog.records if "Attention:" in record.message]


def test_a_wrong_backend_stops_the_run_before_it_begins(tmp_path, probe_with):
    probe_with(lambda query, *others: shared_attention(query * 1.5, *others))
    trainer = make_trainer(tmp_path)
    with pytest.raises(ConfigError, match=r"'sdpa' is wrong on cpu: its output .*layout: padded"):
        trainer.train()
    make_trainer(tmp_path, options={"layout": "padded", "max_steps": 1}).train()


def test_each_kind_of_layer_is_probed_as_the_model_has_it(monkeypatch):
    probed = []

    def spy(device, dtype, *heads_and_options):
        *heads, options = heads_and_options
        probed.append((dtype, tuple(heads), options.window, options.softcap, options.sinks))
        return "some"

    monkeypatch.setattr(checks, "probe", spy)
    calls = check_layout(Layout("shared"), tiny_model("gemma2"))
    check_attention(calls, CPU, torch.bfloat16)
    heads = (4, 2, 8, 8)
    expected = {(torch.bfloat16, heads, window, 5.0, None) for window in (6, None)}
    assert set(probed) == expected
    probed.clear()
    words = check_attention(check_layout(Layout("shared"), tiny_model("gpt_oss")), CPU, None)
    assert {(window, len(sinks)) for *_, window, _, sinks in probed} == {(6, 4), (None, 4)}
    kinds = "some (float32, 4 heads of 8, window 6, sinks), some (float32, 4 heads of 8, sinks)"
    assert words == f"{kinds}; compared with its naive twin on cpu"


def test_float64_stays_float64_under_autocast():
    calls = check_layout(Layout("shared"), tiny_model("llama").double())
    assert check_attention(calls, CPU, torch.bfloat16).startswith("sdpa (float64")


def test_a_kind_of_layer_is_probed_once_in_a_process(monkeypatch):
    probed = []

    def spy(device, *_):
        probed.append(device)
        return "some"

    monkeypatch.setattr(checks, "probe", spy)
    for _ in range(2):
        model = tiny_model("llama")  # three layers of one kind
        check_attention(check_layout(Layout("shared"), model), CPU, None)
    assert probed == [CPU]


def test_a_model_that_is_wrong_in_packed_rows_is_found_out():
    model = tiny_model("llama")
    layer = model.model.layers[1].mlp
    layer.forward = mixing(layer.forward)
    with pytest.raises(ConfigError, match="shared rows give LlamaForCausalLM other hidden states"):
        check_layout(Layout("shared"), model)


@pytest.mark.parametrize("is_decoder", [True, False])
def test_a_padded_model_must_give_a_row_the_same_beside_a_longer_one(is_decoder):
    """An encoder looks at what comes after a token, and so at the padding of a batch."""
    torch.manual_seed(0)
    config = BertConfig(
        **{"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "initializer_range": 0.2, "is_decoder": is_decoder},
    )
    model = BertLMHeadModel(config)
    if is_decoder:
        check_rows(model)
    else:
        with pytest.raises(ModelError, match="BertLMHeadModel gives a sequence other hidden"):
            check_rows(model)


def crowded(forward):
    """Experts with few places: tokens beyond the first 20 of a batch get none."""

    def limited(x):
        places = torch.arange(x.shape[:-1].numel()).view(*x.shape[:-1], 1) < 20
        return forward(x) * places

    return limited


def test_tokens_that_compete_with_those_of_other_rows_stop_a_padded_run(tmp_path):
    model = tiny_llama()
    layer = model.model.layers[1].mlp
    layer.forward = crowded(layer.forward)
    trainer = make_trainer(tmp_path, model, options={"layout": "padded"})
    with pytest.raises(ModelError, match="would depend on the other sequences of a batch"):
        trainer.train()


@pytest.mark.parametrize("family", [*DEAF_FAMILIES, *MASKED_FAMILIES, *MIXING_FAMILIES])
def test_rows_of_padded_families_pass(family):
    model = tiny_model(family)
    check_rows(model)
    check_rows(model.bfloat16())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_packed_row_that_reaches_another_attention_raises(attention):
    """Stock attention would take the row for one long text."""
    model = tiny_model("llama", attention)
    with pytest.raises(ModelError, match="through an attention that would mix its sequences"):
        run_packed(model)


def test_checks_need_no_flash_kernels_that_take_no_float32(monkeypatch):
    """FlashAttention's kernels take only half precision on a GPU."""

    def flash(module, query, *_, **__):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash)
    model = tiny_model("llama")
    # set by hand: loading with this attention needs its package
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(RuntimeError, match="FlashAttention only"):
        model(input_ids=torch.ones(1, 4, dtype=torch.int64))
    for layout in ("shared", "padded"):
        checks.check_model(model, Layout(layout), CPU, torch.bfloat16)
    assert model.config._attn_implementation == "flash_attention_2"


def test_an_attention_that_does_not_run_stops_the_run_with_a_remedy(probe_with):
    def broken(*_):
        raise OSError("no kernel image is available\nfor this device")

    probe_with(broken)
    expected = r"doesn't run on cpu \(OSError: no kernel image is available\); use layout: padded"
    with pytest.raises(ConfigError, match=expected):
        checks.check_model(tiny_model("llama"), Layout("shared"), CPU, None)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_products_in_tf32_are_no_error_of_the_model(family):
    model = tiny_llama(num_hidden_layers=16) if family == "llama" else tiny_model(family)
    with Tf32():
        checks.check_model(model, Layout("shared"), CPU, None)
        model.model.layers[1].forward = mixing(model.model.layers[1].forward)
        with pytest.raises(ConfigError, match="other hidden states"):
            check_layout(Layout("shared"), model)


def mixing(forward):
    """The forward of a layer in which a token also sees the one before it in the row."""
    return lambda x, *others, **more: forward(x + 0.3 * x.roll(1, 1), *others, **more)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention", "flash_attention_2"])
def test_packed_rows_are_right_whatever_attention_the_model_has(attention):
    model = tiny_model("llama").double()
    batch = Layout("shared").collate(SHORT.sequences)
    model.config._attn_implementation = attention  # set by hand, as the flash package is missing
    with torch.no_grad(), packed_attention(model.config, batch.shared_layout):
        got = run_packed(model)
    assert model.config._attn_implementation == attention
    model.config._attn_implementation = "eager"
    with torch.no_grad(), packed_attention(model.config, batch.shared_layout):
        assert torch.equal(got, run_packed(model))


@pytest.mark.parametrize("method", ["forward", "generate"])
def test_no_layout_no_packed_attention(method):
    """Our attention runs for packed rows only, and a call without a layout raises."""
    model = tiny_model("llama")
    input_ids = torch.arange(6)[None]
    layout = Layout("shared").collate(SHORT.sequences).shared_layout
    with (
        packed_attention(model.config, layout),
        pytest.raises(ModelError, match="LlamaAttention doesn't hand the packed layout on"),
    ):
        getattr(model, method)(input_ids)
    count = attention_calls.count
    getattr(model, method)(input_ids, attention_mask=torch.ones_like(input_ids))
    assert attention_calls.count == count


@pytest.mark.parametrize("family", DEAF_FAMILIES)
def test_models_that_cannot_take_our_attention_raise_in_packed_rows(family):
    """transformers only warns if an attention can't be set; other models drop our arguments."""
    model = tiny_model(family)
    layout = Layout("shared").collate(SHORT.sequences).shared_layout
    # Falcon and MPT fail before they get to attention, as they have no mask
    expected = {"falcon": TypeError, "mpt": AttributeError}.get(family, ModelError)
    with packed_attention(model.config, layout), pytest.raises(expected):
        run_packed(model)


@pytest.mark.parametrize("family", MASKED_FAMILIES)
def test_models_that_need_a_mask_are_found_out(family):
    with pytest.raises(
        (ConfigError, ModelError), match=r"use layout: padded|gives packed rows a mask"
    ):
        check_layout(Layout("shared"), tiny_model(family))


@pytest.mark.parametrize("family", {**DEAF_FAMILIES, **MASKED_FAMILIES, **MIXING_FAMILIES})
def test_they_are_right_when_padded(family):
    compare(tiny_model(family).double(), SHORT, Layout("padded"))
