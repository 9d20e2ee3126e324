"""The page of options is complete, and names only options that exist."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from transformers import TrainingArguments

from dpofast import DPOConfig
from dpofast.cli.script_options import ALIASES, ScriptOptions
from dpofast.options.trl_fields import RULES

PAGE = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")


def names_in_tables() -> set[str]:
    """The names in backticks in the first column of all tables."""
    cells = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def test_every_own_option_is_documented() -> None:
    inherited = {item.name for item in fields(TrainingArguments)}
    own = {item.name for item in fields(DPOConfig)} - inherited - set(RULES)
    own |= {item.name for item in fields(ScriptOptions)}
    assert own <= names_in_tables()


def test_options_that_are_only_taken_or_refused_stay_out_of_the_tables() -> None:
    assert not set(RULES) & names_in_tables()


def test_every_documented_option_exists() -> None:
    known = {item.name for item in (*fields(DPOConfig), *fields(ScriptOptions))} | set(ALIASES)
    assert names_in_tables() <= known


def test_documented_defaults_are_the_defaults() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", PAGE, flags=re.MULTILINE))
    values = {"true": True, "false": False}
    config = DPOConfig(output_dir="unused", use_cpu=True, bf16=False)
    for name in ("beta", "label_smoothing", "max_length", "learning_rate", "logging_steps"):
        assert float(rows[name]) == getattr(config, name), name
    for name in ("strict", "disable_dropout", "precompute_ref_log_probs", "trust_remote_code"):
        assert values[rows[name]] == getattr(config, name), name
    assert rows["truncation_mode"] == config.truncation_mode
