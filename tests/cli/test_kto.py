"""`--loss_type kto` on the command line, with unpaired rows and with pairs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpofast.cli import main
from tests.cli.runs import PAIRS, error_of, run_arguments, write_pairs

ROWS = [
    {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
    for pair in PAIRS
    for side in ("chosen", "rejected")
]
KTO = ("--loss_type=kto", "--undesirable_weight=1.5")


def logged_losses(folder: Path) -> list[float]:
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [log["loss"] for log in map(json.loads, lines) if "loss" in log]


@pytest.mark.slow  # two runs
def test_pairs_train_as_the_unpaired_rows_of_their_answers(
    tmp_path: Path, model_folder: Path
) -> None:
    losses = []
    for name, held_out in (("pairs", 2), ("rows", 4)):
        folder = tmp_path / name
        folder.mkdir()
        arguments = run_arguments(folder, model_folder, *KTO, f"--eval_split={held_out}")
        arguments += ["--eval_strategy=steps", "--eval_steps=2"]
        if name == "rows":
            write_pairs(folder / "pairs.json", ROWS)
        assert main(arguments) == 0
        summary = json.loads((folder / "run" / "summary.json").read_text(encoding="utf-8"))
        assert summary["first_loss"] == pytest.approx(0.625, abs=0.13)
        assert "KTOLoss" in summary["loss"]
        losses.append(logged_losses(folder))
    assert len(losses[0]) == 2
    assert losses[0] == losses[1]


def test_ref_build_scores_mismatched_answers_too(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = run_arguments(tmp_path, model_folder, *KTO)[1:]
    assert main(["ref", "build", *arguments]) == 0
    assert "24 answers: 0 found, 24 scored" in capsys.readouterr().out
    message = error_of(capsys, ["ref", "export", *arguments, f"--output={tmp_path}/out.jsonl"])
    assert "the export holds pairs, and kto has none" in message


def test_what_kto_cannot_do_is_one_error(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = run_arguments(tmp_path, model_folder, *KTO)
    message = error_of(capsys, ["inspect", *arguments[1:], "--step=0"])
    assert "--step shows steps of pairs, and kto has none" in message
    message = error_of(capsys, [*arguments, "--dataset_streaming=true"])
    assert "is a stream, and kto trains datasets that are read as a whole" in message
    of_pairs = run_arguments(tmp_path, model_folder)
    write_pairs(tmp_path / "pairs.json", ROWS)
    message = error_of(capsys, of_pairs)
    assert "holds unpaired rows, each with one answer and 'label' (KTO)" in message
    write_pairs(tmp_path / "pairs.json", [row for row in ROWS if row["label"]])
    assert "all 6 rows are desirable" in error_of(capsys, arguments)
