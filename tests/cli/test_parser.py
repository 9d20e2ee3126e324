"""Splitting a command line into the command and its overrides."""

from __future__ import annotations

import pytest

from dpofast.cli.parser import split_arguments


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("train run.yaml --beta 0.2", (["train", "run.yaml"], ["--beta", "0.2"])),
        # DeepSpeed's launcher starts a rank like this
        ("--local_rank=1 train run.yaml --beta 0.2", (["train", "run.yaml"], ["--beta", "0.2"])),
        ("train --config run.yaml --beta 0.2", (["train", "run.yaml"], ["--beta", "0.2"])),
        (
            "ref build --beta 0.2 --config=run.yaml",
            (["ref", "build", "run.yaml"], ["--beta", "0.2"]),
        ),
        ("train --config --beta 0.2", (["train"], ["--config", "--beta", "0.2"])),
        ("train --beta 0.2 --config", (["train"], ["--beta", "0.2", "--config"])),
        ("--local_rank=1 ref info folder", (["ref", "info", "folder"], [])),
    ],
)
def test_arguments_are_split_into_command_and_overrides(arguments, expected):
    assert split_arguments(arguments.split()) == expected
