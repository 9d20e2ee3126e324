"""The lines that `dpofast ref info` prints about a reference."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers

from dpofast.reference.identity.model import model_identity
from dpofast.reference.identity.readable import LONGEST_VALUE, printable, readable_lines
from dpofast.reference.store.info import describe
from dpofast.reference.store.store import ReferenceStore
from tests.reference.stubs import identity
from tests.support import tiny_llama

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def lines_of(model, autocast_dtype=None):
    """-> each line by its name, with broken lines joined."""
    found = model_identity(model, autocast_dtype=autocast_dtype, attention="sdpa", head_version=1)
    text = "\n".join(readable_lines(found.description)).replace("\n    ", " ")
    return dict(line.split(": ", 1) for line in text.splitlines())


def test_a_plain_model():
    lines = lines_of(tiny_llama(), torch.bfloat16)
    assert lines["model"] == "llama, 2 layers, width 32, vocabulary of 259"
    assert lines["weights"].startswith("21 tensors in float32, hash ")
    assert lines["adapter"] == "none, or one that changes nothing"
    assert lines["computed in"] == "bfloat16 autocast"
    assert lines["attention"] == "sdpa"
    assert lines["head"] == "version 1 of dpofast's"
    assert lines["logits"] == "as the head gives them"
    assert "rope_theta 10000.0" in lines["positions"]
    assert "rms_norm_eps 1e-06" in lines["other options"]


def test_layers_that_arent_the_models_own():
    names = ["LigerRMSNorm", "LigerSwiGLUMLP", "liger_rotary_pos_emb"]
    given = {"autocast_dtype": None, "attention": "sdpa", "head_version": 1}
    found = model_identity(tiny_llama(), **given, layers=names)
    assert f"layers: {'; '.join(names)}" in readable_lines(found.description)
    assert "layers" not in model_identity(tiny_llama(), **given).description


@pytest.mark.parametrize(
    ("kind", "options", "name", "said"),
    [
        ("Gemma2", {"num_key_value_heads": 1, "head_dim": 8}, "logits", "capped at 30.0"),
        ("Gemma2", {"num_key_value_heads": 1, "head_dim": 8}, "attention",
         "sdpa, query_pre_attn_scalar 256, sliding_window 4096, attn_logit_softcapping 50.0"),
        ("Cohere", {"logit_scale": 0.25}, "logits", "multiplied by 0.25"),
        ("Granite", {"logits_scaling": 8.0}, "logits", "divided by 8.0"),
        ("HyperCLOVAX", {"logits_scaling": 0.5}, "logits", "multiplied by 0.5"),
    ],
)  # fmt: skip
def test_what_a_family_does_to_logits_and_attention(kind, options, name, said):
    if not hasattr(transformers, f"{kind}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    config = getattr(transformers, f"{kind}Config")(**SMALL, **options, pad_token_id=0)
    lines = lines_of(getattr(transformers, f"{kind}ForCausalLM")(config))
    assert lines[name] == said
    assert lines["computed in"] == "the weights' own dtype"


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_that_contributes(dora):
    options = peft.LoraConfig(target_modules=["q_proj"], use_dora=dora, init_lora_weights=False)
    said = lines_of(peft.get_peft_model(tiny_llama(), options))["adapter"]
    if dora:
        assert said.startswith("in 2 layers (Linear); default.")
        assert "default.use_dora True" in said
    else:
        assert said == "plain LoRA in 2 layers (Linear)"


def test_every_option_that_counts_is_said():
    description = {"scorer": "mine", "config": {"one": {"two": 3}, "four": [5], "none": None}}
    assert readable_lines(description) == [
        "logits: as the head gives them",
        "other options: scorer mine, one.two 3, four [5]",
    ]


def test_a_description_can_not_speak_to_the_terminal(tmp_path):
    evil = "\x1b[2J\x07\u202e\n\r\x9b31m"
    of_names = {evil: evil, "attention": evil, "adapter": {"layers": evil, "kinds": [evil]}}
    reference = identity(
        config={evil: evil, "rope": evil, "model_type": evil, "logit_scale": evil},
        tensors={evil: 1}, head_version=evil, autocast_dtype=evil, **of_names,
    )  # fmt: skip
    store = ReferenceStore.open(tmp_path / evil[:4], create=True)
    writer = store.namespace(reference).writer()
    writer.add(bytes(16), [-1.0])
    writer.commit()
    lines = describe(store.folder)
    assert all(line.isprintable() for line in lines)
    assert sum(line.count("\\x1b[2J") for line in lines) == 14
    assert printable("Ünïcode, 漢字") == "Ünïcode, 漢字"


def test_a_long_value_is_cut():
    (line,) = readable_lines({"note": "x" * 1000})
    assert line == f"other options: note {'x' * (LONGEST_VALUE - 3)}..."


def test_no_description_stops_it():
    for value in (None, 1, "x", [], [{}], {}, {"a": []}):
        description = dict.fromkeys(("weights", "tensors", "adapter", "config", "attention"), value)
        assert all(map(str.isprintable, readable_lines(json.loads(json.dumps(description)))))
