"""TRL's options as fields: taken with one line, renamed or refused, however they are given."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import trl
import yaml
from transformers import HfArgumentParser

from dpofast import DPOConfig
from dpofast.cli.run_options import read_options
from dpofast.errors import ConfigError
from dpofast.options.trl import resolve_config
from dpofast.options.trl_fields import RULES, NoEffect, Refused, Renamed

BASE = {"use_cpu": True, "report_to": "none"}


@dataclass
class ScriptConfig(DPOConfig):
    """A script's own config, with a field of its own."""

    my_field: int = 3


def by_keywords(folder: Path, options: dict[str, Any]) -> DPOConfig:
    return DPOConfig(str(folder), **BASE, **options)


def by_subclass(folder: Path, options: dict[str, Any]) -> DPOConfig:
    return ScriptConfig(str(folder), my_field=5, **BASE, **options)


def by_replace(folder: Path, options: dict[str, Any]) -> DPOConfig:
    return replace(DPOConfig(str(folder), **BASE), **options)


def by_yaml(folder: Path, options: dict[str, Any]) -> DPOConfig:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(folder), **BASE, **options}))
    return read_options(str(path), []).config


def by_command_line(folder: Path, options: dict[str, Any]) -> DPOConfig:
    given = {"output_dir": str(folder), **BASE, **options}
    return read_options(
        None, [f"--{name}={json.dumps(value)}" for name, value in given.items()]
    ).config


def by_trl_parser(folder: Path, options: dict[str, Any]) -> DPOConfig:
    path = folder / "trl.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(folder), **BASE, **options}))
    # TRL's own script has these four; two fields with one name would be an error.
    parser = trl.TrlParser(
        (trl.ScriptArguments, DPOConfig, trl.ModelConfig, trl.DatasetMixtureConfig)
    )
    parsed = parser.parse_args_and_config(["--config", str(path)], fail_with_unknown_args=False)
    config = parsed[1]
    assert isinstance(config, DPOConfig)
    return config


def by_hf_parser(folder: Path, options: dict[str, Any]) -> DPOConfig:
    parser = HfArgumentParser(DPOConfig)
    (config,) = parser.parse_dict({"output_dir": str(folder), **BASE, **options})
    return config


def by_trainer(folder: Path, options: dict[str, Any]) -> DPOConfig:
    return resolve_config(DPOConfig(str(folder), **BASE), options, "model")


WAYS = [
    by_keywords,
    by_subclass,
    by_replace,
    by_yaml,
    by_command_line,
    by_trl_parser,
    by_hf_parser,
    by_trainer,
]
every_way = pytest.mark.parametrize("give", WAYS)
Way = Callable[[Path, dict[str, Any]], DPOConfig]


@every_way
def test_what_would_change_the_training_is_refused_all_at_once(tmp_path: Path, give: Way) -> None:
    with pytest.raises(ConfigError) as caught:
        give(tmp_path, {"rpo_alpha": 0.5, "sync_ref_model": True, "beta": 0.2})
    text = str(caught.value)
    assert "2 options can't be used" in text
    assert "rpo_alpha=0.5 isn't supported: set loss_type: [sigmoid, sft]" in text
    assert "sync_ref_model=True isn't supported" in text


@every_way
def test_what_has_no_effect_is_taken_with_one_line(
    tmp_path: Path, give: Way, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"padding_free": True, "pad_to_multiple_of": 8, "use_cache": True}
    with caplog.at_level(logging.WARNING, "dpofast"):
        config = give(tmp_path, options)
    assert config.padding_free is True
    (line,) = [record.getMessage() for record in caplog.records if "effect" in record.message]
    assert line.startswith("These options have no effect: ")
    for name, value in options.items():
        assert f"{name}={value!r} (" in line or f"{name}='{value}' (" in line


@every_way
def test_an_old_name_is_taken_under_the_present_one(tmp_path: Path, give: Way) -> None:
    options = {"evaluation_strategy": "steps", "per_gpu_train_batch_size": 3, "warmup_ratio": 0.1}
    config = give(tmp_path, options)
    assert config.eval_strategy == "steps"
    assert config.per_device_train_batch_size == 3
    assert config.get_warmup_steps(41) == 5
    assert replace(config, eval_strategy="no").eval_strategy == "no"
    assert replace(config, per_device_train_batch_size=4).per_device_train_batch_size == 4


def test_both_names_with_two_values_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'steps' contradicts eval_strategy='epoch'"):
        by_keywords(tmp_path, {"evaluation_strategy": "steps", "eval_strategy": "epoch"})
    config = by_keywords(tmp_path, {"evaluation_strategy": "epoch", "eval_strategy": "epoch"})
    assert config.eval_strategy == "epoch"


@pytest.mark.parametrize(
    "name", [name for name, rule in RULES.items() if isinstance(rule, Refused)]
)
def test_every_refusal_says_what_to_do(tmp_path: Path, name: str) -> None:
    values = {
        "tools": [{}],
        "save_safetensors": False,
        "rpo_alpha": 0.0,
        "model_adapter_name": "a",
        "ref_adapter_name": "b",
    }
    value = values.get(name, True)
    remedy = RULES[name].remedy  # type: ignore[union-attr]
    with pytest.raises(ConfigError) as caught:
        by_keywords(tmp_path, {name: value})
    assert str(caught.value) == f"{name}={value!r} isn't supported: {remedy}."


def test_values_that_change_nothing_are_taken_without_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class FDivergenceType(Enum):  # as in old versions of TRL
        REVERSE_KL = "reverse_kl"

    config = by_keywords(
        tmp_path,
        {
            "ld_alpha": 1.0,
            "loss_weights": [1.0],
            "is_encoder_decoder": False,
            "f_divergence_type": FDivergenceType.REVERSE_KL,
            "f_alpha_divergence_coef": 1.0,
            "pad_to_multiple_of": None,
        },
    )
    assert config.ld_alpha == 1.0
    assert not [record for record in caplog.records if "no effect" in record.getMessage()]


def test_logs_and_checkpoints_show_only_options_with_an_effect(tmp_path: Path) -> None:
    shown = by_keywords(tmp_path, {"padding_free": True, "warmup_ratio": 0.1}).to_dict()
    assert not set(RULES) & set(shown)
    assert shown["warmup_ratio"] == 0.1


def test_help_leaves_out_what_is_only_refused() -> None:
    shown = HfArgumentParser(DPOConfig).format_help()
    listed = [name for name, rule in RULES.items() if f"--{name} " in shown]
    assert "padding_free" in listed
    assert not [name for name in listed if isinstance(RULES[name], Refused)]
    assert "rpo_alpha" not in shown


def test_a_rule_names_an_option_that_exists() -> None:
    known = set(DPOConfig.__dataclass_fields__)
    assert {rule.now for rule in RULES.values() if isinstance(rule, Renamed)} <= known
    assert all(rule.reason for rule in RULES.values() if isinstance(rule, NoEffect))


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("rpo_alpha", 0.5, "rpo_alpha=0.5 isn't supported"),
        ("ld_alpha", 1.5, "ld_alpha: got 1.5"),
        ("torch_compile", True, "torch_compile isn't supported"),
        ("warmup_ratio", 5.0, "warmup_ratio: got 5.0"),
        ("loss_type", "ppo", "loss_type: Unknown loss 'ppo'"),
        ("max_prompt_length", 0, "max_prompt_length: got 0"),
    ],
)
def test_an_option_that_a_script_sets_later_is_checked_by_the_trainer(
    tmp_path: Path, name: str, value: Any, sentence: str
) -> None:
    config = by_keywords(tmp_path, {})
    setattr(config, name, value)
    with pytest.raises(ConfigError, match=sentence):
        resolve_config(config, {}, "model")


def test_an_option_that_a_script_sets_later_is_taken_as_if_it_were_given(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = by_keywords(tmp_path, {"padding_free": True})
    caplog.clear()
    config.loss_type, config.max_target_length, config.use_cache = "hinge", 7, True
    for _ in range(2):
        assert resolve_config(config, {}, "model") is config
    assert (config.loss_type, config.max_completion_length) == (["hinge"], 7)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("These options have no effect: use_cache=True (")
    assert "padding_free" not in line, "it was named when it was given"


class TestOwnClasses:
    def test_a_config_that_inherits_ours_keeps_its_class_and_fields(self, tmp_path: Path) -> None:
        config = resolve_config(by_subclass(tmp_path, {}), {"beta": 0.7}, "model")
        assert isinstance(config, ScriptConfig)
        assert (config.my_field, config.beta) == (5, 0.7)

    def test_unknown_names_are_refused_in_it_with_a_hint(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="ScriptConfig: there is no option 'betta'; did you"):
            by_subclass(tmp_path, {"betta": 0.1})

    def test_an_init_of_its_own_takes_what_it_wants(self, tmp_path: Path) -> None:
        class Short(DPOConfig):
            def __init__(self, folder: Path, strength: float) -> None:
                super().__init__(str(folder), beta=strength, **BASE)

        assert Short(tmp_path, strength=0.4).beta == 0.4

    def test_a_config_that_inherits_trls_is_taken_without_its_own_fields(
        self, tmp_path: Path
    ) -> None:
        @dataclass
        class Theirs(trl.DPOConfig):
            my_field: int = 3

        options = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": []}
        assert resolve_config(Theirs(**options, beta=0.3), {}, "model").beta == 0.3
        assert resolve_config(Theirs(**options, ld_alpha=0.3), {}, "model").ld_alpha == 0.3
        with pytest.raises(ConfigError, match="sync_ref_model"):
            resolve_config(Theirs(**options, sync_ref_model=True), {}, "model")


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"warmup_ratio": 0.1}, 10),
        ({"warmup_ratio": 1.0}, 95),  # warmup_steps=1.0 would be one step
        ({"warmup_ratio": 0.0}, 0),
        ({"warmup_ratio": 0.1, "warmup_steps": 7}, 7),
        ({"warmup_ratio": 0.5, "warmup_steps": 0.1}, 10),
        ({"warmup_steps": 0.1}, 10),
    ],
)
def test_warmup_ratio_is_a_share_of_all_steps(
    tmp_path: Path, options: dict[str, Any], steps: int
) -> None:
    assert by_keywords(tmp_path, options).get_warmup_steps(95) == steps
