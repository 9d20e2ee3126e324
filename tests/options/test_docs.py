"""The table in docs/from-trl.md has every option of TRL, and says of each what becomes of it."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import TrainingArguments

from dpofast import DPOConfig
from dpofast.errors import ConfigError
from dpofast.options.trl_fields import RULES, NoEffect, Renamed
from dpofast.options.unsupported import UNUSED

PAGE = (Path(__file__).parents[2] / "docs" / "from-trl.md").read_text(encoding="utf-8")
SECTION = PAGE.split("## Options\n")[1].split("\n## ")[0]
ROWS = [
    row for row in re.findall(r"^\| (.+) \| (.+) \|(.*)\|$", SECTION, re.MULTILINE) if "`" in row[0]
]
FATE = {name: fate for names, fate, _ in ROWS for name in re.findall(r"`(\w+)`", names)}
NEWER_NAME = {
    old: new
    for names, fate, now in ROWS
    if fate == "renamed"
    for old, new in zip(re.findall(r"`(\w+)`", names), re.findall(r"`(\w+)`", now), strict=True)
}


def fate_of(name: str) -> str:
    """What the code does with an option."""
    if name in UNUSED:
        return "no effect"
    rule = RULES.get(name)
    if rule is None:
        return "same"
    if isinstance(rule, Renamed):
        return "renamed"
    return "no effect" if isinstance(rule, NoEffect) else "refused"


def test_no_option_is_in_two_rows() -> None:
    named = [name for names, *_ in ROWS for name in re.findall(r"`(\w+)`", names)]
    assert len(named) == len(set(named))


def test_each_option_is_treated_as_the_table_says() -> None:
    assert {name: fate_of(name) for name in FATE} == FATE
    assert set(FATE) <= {item.name for item in fields(DPOConfig)}


def test_the_table_has_every_rule() -> None:
    assert set(RULES) <= set(FATE)
    assert {
        name: rule.now for name, rule in RULES.items() if isinstance(rule, Renamed)
    } == NEWER_NAME


@pytest.mark.peer
def test_the_table_has_every_option_of_trl() -> None:
    trl = pytest.importorskip("trl", reason="needs the extra `bench`")
    inherited = {item.name for item in fields(TrainingArguments)}
    assert {item.name for item in fields(trl.DPOConfig)} - inherited <= set(FATE)


def test_a_refused_option_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^rpo_alpha=0\.5 isn't supported: set loss_type"):
        DPOConfig(str(tmp_path), use_cpu=True, rpo_alpha=0.5)
