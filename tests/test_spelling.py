"""A hint is the name that was misspelt; names that only look alike get none."""

from __future__ import annotations

from dataclasses import fields

import pytest

from dpofast import DPOConfig
from dpofast.cli.script_options import ScriptOptions
from dpofast.options.foreign import hintable
from dpofast.spelling import nearest_name

OPTIONS = hintable(item.name for item in (*fields(ScriptOptions), *fields(DPOConfig)))


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("bata", "beta"),  # wrong
        ("beat", "beta"),  # swapped
        ("betta", "beta"),  # doubled
        ("bta", "beta"),  # missing
        ("ebta", "beta"),  # swapped at the beginning
        ("lerning_rtae", "learning_rate"),  # in two words
        ("max_lenght", "max_length"),
        ("gradient_acumulaton_steps", "gradient_accumulation_steps"),  # two in a long word
        ("eval_step", "eval_steps"),
        ("dataset_share", "dataset_shares"),
        ("maxlength", "max_length"),
        ("maxLength", "max_length"),
        ("MAX-LENGTH", "max_length"),
    ],
)
def test_a_typo_is_understood(name, meant):
    assert nearest_name(name, OPTIONS) == meant


@pytest.mark.parametrize(
    "name",
    [
        "datasets",
        "lora_task",
        "chosen_response",
        "sigmoid_norm",
        "lora_rank",
        "lora_b",
        "fp32",
        "adam_beta3",
        "eta",
        "feed",
        "num_epochs",
        "per_device_batch_size",
        "warmup",
        "gamma",
        "",
        "_",
    ],
)
def test_another_name_is_no_typo(name):
    assert nearest_name(name, [*OPTIONS, "chosen_reward", "sigmoid"]) is None


def test_no_option_is_a_typo_of_another():
    for name in OPTIONS:
        assert nearest_name(name, [other for other in OPTIONS if other != name]) is None, name


def test_every_swap_and_every_missing_or_doubled_letter_is_understood():
    """In one option of fifteen, for words of four letters or more, behind the first letter."""
    for name in OPTIONS[::15]:
        words = name.split("_")
        for place, word in enumerate(words):
            if len(word) < 4 or not word.isalpha():
                continue
            for i in range(1, len(word) - 1):
                typos = {
                    word[:i] + word[i + 1] + word[i] + word[i + 2 :],
                    word[:i] + word[i + 1 :],
                    word[:i] + word[i] + word[i:],
                }
                for typo in typos - {word}:
                    wrong = "_".join([*words[:place], typo, *words[place + 1 :]])
                    assert wrong in OPTIONS or nearest_name(wrong, OPTIONS) == name, wrong


def test_the_fewest_typos_win_and_the_first_name_breaks_a_tie():
    assert nearest_name("scored", ["scares", "scorer", "stored"]) == "scorer"
