"""`dpofast train` trains tiny models of all types, saves them, and transformers loads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.model_types import TRAINABLE
from tests.trained_families import check_trained, family_of_each_type, train_family

# One type for each way of looking at other tokens, and classes with more than text.
WAYS = {
    *("llama4_text", "gemma4_text", "gpt_oss", "deepseek_v3"),  # chunks, windows, sinks, experts
    *("qwen3_5_text", "lfm2", "granitemoehybrid"),  # delta rule, convolution, Mamba-2
    *("gemma3", "gemma3n"),  # towers
    *("bloom", "glm_moe_dsa"),  # padded
}


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(each, marks=pytest.mark.slow if each in WAYS else pytest.mark.torture)
        for each in sorted(TRAINABLE)
    ],
)
def test_what_is_trained_is_saved_and_loaded(tmp_path: Path, model_type: str) -> None:
    families = family_of_each_type()
    if model_type not in families:
        pytest.skip(f"this version of transformers has no {model_type}")
    check_trained(train_family(families[model_type], tmp_path))
