"""Adapters in packed rows: their gradients, and log-probs with the adapters switched off."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch

from dpofast.data.packing.collate import Layout
from dpofast.model.scorer import SequenceScorer
from tests.exactness import SHORT, compare
from tests.families import tiny_model
from tests.support import answer_logps, float64_throughout, make_trainer, train

peft = pytest.importorskip("peft", reason="needs the extra `peft`")

TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gemma2": ["q_proj", "v_proj", "up_proj"],
    "gpt_neox": ["query_key_value", "dense_h_to_4h"],
    "mixtral": ["q_proj", "k_proj", "v_proj", "o_proj"],
}


def with_adapter(model, targets, **options):
    torch.manual_seed(1)
    fields = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "target_modules": targets}
    return peft.get_peft_model(model, peft.LoraConfig(**fields, **options)).double()


@pytest.mark.parametrize("name", ["shared", "unshared"])
@pytest.mark.parametrize("family", TARGETS)
def test_lora_in_packed_rows_equals_separate_sequences(family, name):
    model = with_adapter(tiny_model(family), TARGETS[family])
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in name for name in trained)
    assert {target for target in TARGETS[family] if any(target in n for n in trained)} == (
        set(TARGETS[family])
    )
    compare(model, SHORT, Layout(name))


@pytest.mark.parametrize("reentrant", [True, False])
def test_lora_with_gradient_checkpointing(reentrant):
    model = with_adapter(tiny_model("llama"), TARGETS["llama"])
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    compare(model, SHORT, Layout("shared"))


@pytest.mark.parametrize("layout", ["shared", "unshared", "padded"])
def test_adapters_switched_off_score_as_the_model_below_them(layout):
    base = tiny_model("llama").double()
    model = with_adapter(copy.deepcopy(base), TARGETS["llama"])
    with float64_throughout():
        score = SequenceScorer(model, contextlib.nullcontext, Layout(layout))
        on = torch.cat([torch.from_numpy(logps) for logps in score(SHORT.sequences)])
        with model.disable_adapter():
            off = score(SHORT.sequences)
        with torch.no_grad():
            expected = [answer_logps(base, *sequence).item() for sequence in SHORT.sequences]
    assert [logps.sum() for logps in off] == pytest.approx(expected, abs=1e-11)
    assert (on - torch.cat([torch.from_numpy(logps) for logps in off])).abs().max() > 0.01


def padded_lines(caplog):
    return [record.message for record in caplog.records if "Layout: padded, as" in record.message]


@pytest.mark.parametrize("disable", [False, True])
def test_dropout_of_an_adapter_is_padded_unless_it_is_switched_off(tmp_path, caplog, disable):
    caplog.set_level("INFO", logger="dpofast")
    adapter = peft.LoraConfig(target_modules=["q_proj"], lora_dropout=0.2)
    options = {"max_steps": 2, "disable_dropout": disable}
    trainer = make_trainer(tmp_path, peft_config=adapter, options=options)
    assert trainer.layout.name == ("shared" if disable else "padded")
    assert padded_lines(caplog) == (
        [] if disable else ["Layout: padded, as Dropout has a dropout above 0."]
    )
    assert len(train(trainer)) == 2
