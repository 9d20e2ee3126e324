"""What is said about options of loading, where a model is given that is loaded already."""

from __future__ import annotations

import logging

import pytest

from dpofast import DPOConfig
from dpofast.errors import ConfigError
from dpofast.model.load import load_policy
from dpofast.train.policy import prepare_policy, resolve_model, resolve_ref_model
from tests.families import tiny_model
from tests.support import byte_tokenizer, tiny_llama


@pytest.mark.parametrize("is_loaded_here", [True, False])
def test_options_of_loading_are_ignored_only_where_a_user_has_loaded_the_model(
    tmp_path, caplog, is_loaded_here
):
    tiny_llama().save_pretrained(tmp_path)
    model, reference = tiny_llama(), tiny_llama()
    if is_loaded_here:  # as the commands do
        model, reference = load_policy(str(tmp_path)), load_policy(str(tmp_path))
    options = {"model_init_kwargs": {"use_cache": False}, "ref_model_init_kwargs": {}}
    config = DPOConfig(str(tmp_path), use_cpu=True, **options)
    with caplog.at_level(logging.INFO, "dpofast"):
        resolve_ref_model(reference, model, config)
        resolve_model(model, config, byte_tokenizer())
    lines = [line for line in caplog.messages if "are ignored" in line]
    assert len(lines) == (0 if is_loaded_here else 2)


def test_checkpointing_is_refused_where_the_class_has_none(tmp_path):
    options = {"use_cpu": True, "bf16": False}
    config = DPOConfig(str(tmp_path), **options, gradient_checkpointing=True)
    with pytest.raises(ConfigError, match="gradient_checkpointing: CTRLLMHeadModel doesn't"):
        prepare_policy(tiny_model("ctrl"), config, None)
    for wanted in ("auto", False):
        config = DPOConfig(str(tmp_path), **options, gradient_checkpointing=wanted)
        prepare_policy(tiny_model("ctrl"), config, None)
