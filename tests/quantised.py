"""Tiny models that bitsandbytes quantises, for several tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.support import byte_tokenizer, tiny_llama

pytest.importorskip("bitsandbytes", reason="needs the extra `bitsandbytes`")

KINDS: dict[str, dict[str, Any]] = {
    "fp4": {"load_in_4bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nested": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "8bit": {"load_in_8bit": True},
}


def save_base(folder: Path, **overrides: Any) -> Path:
    """Save an unquantised model with its tokenizer; its layers are whole blocks of 64 weights."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "attention_bias": True}
    model = tiny_llama(**{**sizes, **overrides})
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    config = BitsAndBytesConfig(**{**KINDS[kind], **more})
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


def adapter(**options: Any) -> Any:
    import peft

    names = ["q_proj", "v_proj", "down_proj"]
    return peft.LoraConfig(**{"r": 4, "target_modules": names, **options})


def repacks_on_this_machine() -> bool:
    """Whether bitsandbytes repacks 4-bit weights for inference on this CPU."""
    from bitsandbytes.functional import has_avx512bf16

    return bool(has_avx512bf16())
