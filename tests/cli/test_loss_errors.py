"""What a loss can't take ends `dpofast train` with one sentence and exit code 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dpofast.cli import main
from tests.cli.runs import PAIRS, error_of, run_arguments, write_pairs


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--loss_type=hnige"], "Unknown loss 'hnige'. Did you mean 'hinge'?"),
        (
            ["--loss_type=[sigmoid,hinge]", "--loss_weights=[1.0]"],
            "loss_weights: got 1 weights for the 2 losses of loss_type, sigmoid, hinge; give one",
        ),
        (["--loss_type=exo_pair"], "set it to 1e-3"),
        (
            ["--ld_alpha=0.5", "--reference_store_detail=sums"],
            "reference_store_detail: got 'sums', but ld_alpha=0.5 needs",
        ),
    ],
    ids=str,
)
def test_options(
    tmp_path: Path,
    model_folder: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    words: str,
) -> None:
    assert words in error_of(capsys, run_arguments(tmp_path, model_folder, *options))


@pytest.mark.parametrize(
    ("columns", "options", "words"),
    [
        (
            {"label_confidence": 1.5},
            [],
            "row 0 (counted from 0): label_confidence is 1.5, but this column is the probability",
        ),
        (
            {"weight": -1.0},
            [],
            "row 0 (counted from 0): weight is -1.0, but this column is how much the row counts",
        ),
        ({"label_confidence": 0.9}, ["--loss_type=ipo"], "the ipo loss has no smoothed form"),
    ],
    ids=str,
)
def test_columns(
    tmp_path: Path,
    model_folder: Path,
    capsys: pytest.CaptureFixture[str],
    columns: dict[str, Any],
    options: list[str],
    words: str,
) -> None:
    arguments = run_arguments(tmp_path, model_folder, *options)
    write_pairs(tmp_path / "pairs.json", [{**pair, **columns} for pair in PAIRS])
    assert main(arguments) == 2
    assert words in capsys.readouterr().err
