"""The names of saved tensors are compared under ZeRO-3, whose ranks hold parts of the weights."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.distributed.launch import launch
from tests.support import tiny_llama

pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).with_name("saving_ranks.py")


def test_what_zero_3_saves_is_what_from_pretrained_expects(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "wrong")
    file = tmp_path / "wrong" / "model.safetensors"
    tensors = load_file(file)
    del tensors["lm_head.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    launch(SCRIPT, 2, str(tmp_path))
    assert json.loads((tmp_path / "found.json").read_text()) == {
        "full": {"before": "", "after": "", "wrong": "1 missing (lm_head.weight)"},
        "lora": {"before": "", "after": "", "wrong": ""},
        "could not compare": [],
    }
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "full" / "saved")
    assert not torch.equal(again.lm_head.weight, model.lm_head.weight)
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "lora" / "saved")
    assert any(p.abs().sum() > 0 for n, p in adapted.named_parameters() if "lora_B" in n)
