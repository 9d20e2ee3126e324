"""Runs of the command line on a few pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dpofast.cli import main

PAIRS = [
    {"prompt": f"Say {word}.", "chosen": word, "rejected": f"{word}, I guess"}
    for word in ("one", "two", "three", "four", "five", "six")
]


def write_pairs(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def run_arguments(folder: Path, model_folder: Path, *more: str) -> list[str]:
    """Arguments of `dpofast train` for two steps of two PAIRS."""
    data = write_pairs(folder / "pairs.json", PAIRS)
    options = {
        "model_name_or_path": model_folder,
        "dataset_name": data,
        "output_dir": folder / "run",
        "reference_store": folder / "reference",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": "1e-3",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": "true",
        "bf16": "false",
    }
    return ["train", *(f"--{name}={value}" for name, value in options.items()), *more]


def error_of(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The error message of a run that must end with exit code 2."""
    capsys.readouterr()
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dpofast: ")]
    assert len(lines) == 1
    return lines[0]
