"""Options that don't exist: each is refused with what to write instead, all in one error."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

from dpofast import DPOConfig
from dpofast.cli.script_options import ALIASES, ScriptOptions
from dpofast.errors import ConfigError
from dpofast.options.foreign import about_unknown, refuse_unknown_options
from dpofast.options.foreign_keys import IN_PYTHON, OTHER_KEYS, OTHER_NAMES
from dpofast.options.trl_fields import RULES
from dpofast_kernels import LOSSES

# Words in the remedies that are values, or parts of a value.
VALUES = {"zero2_offload", "zero3_offload", "flash_attention_2", "keep_end"}
VALUES |= {"tokens_per_second", "quantization_config", "requires_grad", *LOSSES}
OURS = {item.name for item in fields(DPOConfig)} | {item.name for item in fields(ScriptOptions)}


def test_the_keys_of_other_tools_are_no_options_here() -> None:
    assert not (set(OTHER_NAMES) | set(OTHER_KEYS)) & (OURS | set(ALIASES))
    assert not set(OTHER_NAMES) & set(OTHER_KEYS)


def test_every_name_that_is_suggested_exists_and_has_an_effect() -> None:
    assert set(OTHER_NAMES.values()) <= OURS - set(RULES)
    for key, remedy in OTHER_KEYS.items():
        named = set(re.findall(r"\b[a-z]+(?:_[a-z0-9]+)+\b", remedy)) - VALUES
        assert named <= OURS, key


def test_options_of_the_command_line_have_an_answer_in_python() -> None:
    assert {item.name for item in fields(ScriptOptions)} <= set(IN_PYTHON)
    with pytest.raises(ConfigError, match="DPOConfig: lora_r isn't an option here: pass peft_con"):
        DPOConfig("unused", lora_r=8)
    with pytest.raises(ConfigError, match="DPOConfig: lora_rank isn't an option here: pass peft_"):
        DPOConfig("unused", lora_rank=8)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("cutoff_len", "write max_length"),  # LLaMA-Factory
        ("pref_beta", "write beta"),
        ("pref_loss", "write loss_type"),
        ("finetuning_type", "set use_peft"),
        ("stage", "leave it out; dpofast trains DPO only"),
        ("template", "the tokenizer's chat template"),
        ("lora_target", "all linear layers is all-linear, not all"),
        ("plot_loss", "has a plot of every run"),
        ("pref_ftx", "set loss_type: [sigmoid, sft]"),
        ("base_model", "write model_name_or_path"),  # axolotl
        ("sequence_len", "write max_length"),
        ("micro_batch_size", "write per_device_train_batch_size"),
        ("val_set_size", "set eval_split"),
        ("adapter", "set use_peft"),
        ("test_datasets", "name one of the files in eval_dataset_name"),
        ("wandb_name", "write run_name"),
        ("lora", "set use_peft"),  # not a misspelt lora_r
        ("rl", "dpofast trains DPO only"),
        ("rlhf_type", "dpofast trains DPO only"),  # ms-swift
        ("pretrain", "write model_name_or_path"),  # OpenRLHF
        ("zero_stage", "set deepspeed"),
        ("lr_warmup_ratio", "write warmup_ratio"),
        ("packing_samples", "layout says whether rows are packed"),
        ("dataset_mixer", "list the names in dataset_name"),  # the alignment handbook
        ("use_flash_attention_2", "set attn_implementation"),
        ("fp16_opt_level", "transformers has removed it"),
    ],
)
def test_a_key_of_another_tool_says_what_to_write(name: str, sentence: str) -> None:
    about = about_unknown(name, "x", OURS)
    assert about is not None
    assert about.startswith(f"{name} isn't an option here: ")
    assert sentence in about


def test_options_of_trls_scripts_are_dropped_where_their_value_changes_nothing() -> None:
    given = {"beta": 0.1, "datasets": [], "model_init": None, "ignore_bias_buffers": False}
    assert refuse_unknown_options(given, OURS) == {"beta": 0.1}
    with pytest.raises(ConfigError, match="datasets=\\['a'\\] isn't supported: list the paths"):
        refuse_unknown_options({"datasets": ["a"]}, OURS)
    with pytest.raises(ConfigError, match="DPOConfig: streaming isn't an option here: set dataset"):
        DPOConfig("unused", streaming=False)


def test_all_names_are_refused_at_once_and_none_is_suggested_that_would_be_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        DPOConfig("unused", betta=1, ld_alfa=0.5, cutoff_len=3, zzz=1)
    assert str(caught.value).splitlines() == [
        "4 options can't be used:",
        "  DPOConfig: there is no option 'betta'; did you mean 'beta'?",
        "  DPOConfig: there is no option 'ld_alfa'; see docs/configuration.md.",
        "  DPOConfig: cutoff_len isn't an option here: write max_length.",
        "  DPOConfig: there is no option 'zzz'; see docs/configuration.md.",
    ]
