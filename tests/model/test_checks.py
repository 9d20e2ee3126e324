"""What a run checks before it begins: packed rows, and the attention for them on this device."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dpofast.data.packing.collate import Layout
from dpofast.errors import ConfigError, ModelError
from dpofast.model import checks
from dpofast.model.attention import Calls, packed_attention
from dpofast.model.checks import check_attention, check_layout
from dpofast.model.forward import pair_step, run_batch
from dpofast_kernels.attention import dispatch
from dpofast_kernels.attention.segments import sdpa_attention
from tests.exactness import SHORT, compare
from tests.families import DEAF_FAMILIES, MASKED_FAMILIES, MIXING_FAMILIES, tiny_model
from tests.support import make_trainer, tiny_llama
from tests.tf32 import Tf32

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forget_what_was_probed():
    checks._probed.cache_clear()
    yield
    checks._probed.cache_clear()


def run_packed(model):
    """One packed micro-batch through the model's body, whatever attention it has."""
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


def test_a_wrong_backend_stops_the_run_before_it_begins(tmp_path, monkeypatch):
    def unscaled(call):
        return sdpa_attention(replace(call, query=call.query * 1.5))

    monkeypatch.setitem(dispatch.ATTENTIONS, "sdpa", unscaled)
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


def test_the_check_of_attention_takes_a_moment_on_a_cpu():
    model = tiny_model("llama")
    calls = check_layout(Layout("shared"), model)
    check_attention(calls, CPU, None)
    checks._probed.cache_clear()
    start = time.process_time()
    check_attention(calls, CPU, None)
    assert time.process_time() - start < 0.5  # measured: 0.005
    start = time.process_time()
    check_attention(calls, CPU, None)
    assert time.process_time() - start < 0.01, "once in a process"


def test_a_model_that_is_wrong_in_packed_rows_is_found_out():
    """One whose layers look past the attention: each token also sees the one before it."""
    model = tiny_model("llama")
    layer = model.model.layers[1].mlp
    forward = layer.forward
    layer.forward = lambda x: forward(x + 0.3 * x.roll(1, 1))
    with pytest.raises(ConfigError, match="shared rows give LlamaForCausalLM other hidden states"):
        check_layout(Layout("shared"), model)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_packed_row_that_reaches_another_attention_raises(attention):
    """Stock attention would take the row for one long text, or for documents that it isn't."""
    model = tiny_model("llama", attention)
    with pytest.raises(ModelError, match="through an attention that would mix its sequences"):
        run_packed(model)


def test_checks_need_no_flash_kernels_that_take_no_float32(monkeypatch):
    """As FlashAttention's: half precision alone, on a GPU."""

    def flash(module, query, *_, **__):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash)
    model = tiny_model("llama")
    model.config._attn_implementation = "flash_attention_2"  # as loaded where the package is there
    with pytest.raises(RuntimeError, match="FlashAttention only"):
        model(input_ids=torch.ones(1, 4, dtype=torch.int64))
    for layout in ("shared", "padded"):
        checks.check_model(model, Layout(layout), CPU, torch.bfloat16)
    assert model.config._attn_implementation == "flash_attention_2"


def test_an_attention_that_does_not_run_stops_the_run_with_a_remedy(monkeypatch):
    def broken(*_):
        raise OSError("no kernel image is available\nfor this device")

    monkeypatch.setitem(dispatch.ATTENTIONS, "sdpa", broken)
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
    """A layer in which a token sees the one before it in the row."""
    return lambda x, *others, **more: forward(x + 0.3 * x.roll(1, 1), *others, **more)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention", "flash_attention_2"])
def test_packed_rows_are_right_whatever_attention_the_model_has(attention):
    model = tiny_model("llama").double()
    batch = Layout("shared").collate(SHORT.sequences)
    model.config._attn_implementation = attention  # as loaded; the flash package isn't needed here
    with torch.no_grad(), packed_attention(model.config, batch.shared_layout):
        got = run_packed(model)
    assert model.config._attn_implementation == attention
    model.config._attn_implementation = "eager"
    with torch.no_grad(), packed_attention(model.config, batch.shared_layout):
        assert torch.equal(got, run_packed(model))


@pytest.mark.parametrize("method", ["forward", "generate"])
def test_no_layout_no_packed_attention(method):
    """Our attention runs for packed rows alone: anything else in its place stops."""
    model = tiny_model("llama")
    input_ids = torch.arange(6)[None]
    layout = Layout("shared").collate(SHORT.sequences).shared_layout
    with (
        packed_attention(model.config, layout),
        pytest.raises(ModelError, match="LlamaAttention doesn't hand the packed layout on"),
    ):
        getattr(model, method)(input_ids)
    count = Calls.count
    getattr(model, method)(input_ids, attention_mask=torch.ones_like(input_ids))
    assert Calls.count == count


@pytest.mark.parametrize("family", DEAF_FAMILIES)
def test_models_that_cannot_take_our_attention_raise_in_packed_rows(family):
    """Some have no settable attention, which transformers only warns of; some drop arguments."""
    model = tiny_model(family)
    layout = Layout("shared").collate(SHORT.sequences).shared_layout
    # Falcon and MPT stumble over the mask that isn't there, before they get to attention
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
