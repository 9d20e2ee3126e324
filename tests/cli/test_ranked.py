"""Rows with many answers on the command line, whose pairs `--answer_pairs` chooses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpofast.cli import main
from dpofast.cli.run_data import load_held_out_data, load_training_data
from dpofast.cli.run_options import read_options
from dpofast.data import rows_by_source
from tests.cli.runs import PAIRS, error_of, run_arguments, write_pairs

ROWS = [
    {
        "prompt": f"Say {word}.",
        "completions": [word, f"{word}, I guess", "no", f"{word} {word}"],
        "scores": [3, 2, 0, 2],
    }
    for word in ("one", "two", "three", "four", "five", "six")
]


def write_rows(folder: Path) -> Path:
    """The file that `run_arguments` names, with ROWS."""
    return write_pairs(folder / "pairs.json", ROWS)


def test_a_run_trains_the_pairs_that_the_option_asks_for(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = run_arguments(tmp_path, model_folder)
    data = str(write_rows(tmp_path))
    assert main(["ref", "build", *arguments[1:]]) == 0
    assert "24 answers: 0 found, 24 scored" in capsys.readouterr().out
    assert main([*arguments, "--answer_pairs=best_worst"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["data"]["train"]["pairs_kept"] == 6
    assert summary["first_loss"] == pytest.approx(0.6931, abs=1e-4)
    message = error_of(capsys, [*arguments, "--answer_pairs=given"])
    assert f"{data}: 6 of 6 rows can't be used" in message


def test_a_mixture_with_pairs_is_split_by_whole_rows(tmp_path: Path) -> None:
    names = [str(write_pairs(tmp_path / "many.json", ROWS))]
    other = [{**pair, "prompt": f"Please: {pair['prompt']}"} for pair in PAIRS]
    names.append(str(write_pairs(tmp_path / "two.json", other)))
    arguments = ["--use_cpu", "--bf16=false", "--dataset_name", *names, "--eval_split=0.34"]
    options = read_options(None, [*arguments, "--answer_pairs=adjacent"])
    training, held_out = load_training_data(options), load_held_out_data(options)
    assert rows_by_source(training) == {names[0]: 16, names[1]: 4}
    assert rows_by_source(held_out) == {names[0]: 8, names[1]: 2}
    assert set(training["prompt"]).isdisjoint(held_out["prompt"])


def test_a_row_is_shown_with_its_answers_and_pairs(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = run_arguments(tmp_path, model_folder)[1:]
    write_rows(tmp_path)
    assert main(["inspect", *arguments, "--row=1", "--answer_pairs=adjacent"]) == 0
    shown = capsys.readouterr().out
    assert "row 1 (counted from 0): prompt " in shown
    assert "pairs, chosen > rejected (4): 0 > 1, 0 > 3, 1 > 2, 3 > 2" in shown
    assert "pairs that equal scores leave unmade: 1" in shown
    assert "t|w|o|,| |I| |g|u|e|s|s" in shown


def test_what_takes_no_rows_with_many_answers_says_so(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = run_arguments(tmp_path, model_folder)
    write_rows(tmp_path)
    message = error_of(capsys, [*arguments, "--loss_type=kto"])
    assert "rows with many answers (completions)" in message
    assert "write each answer as a row with completion and label" in message
    main(["ref", "build", *arguments[1:]])
    message = error_of(capsys, ["ref", "export", *arguments[1:], f"--output={tmp_path}/out.jsonl"])
    assert "the file would have columns of one pair: write each pair as a row" in message


def test_a_row_with_an_empty_answer_is_shown_with_what_it_loses(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = run_arguments(tmp_path, model_folder)[1:]
    rows = [{**ROWS[0], "completions": ["a", "b", "", "d"]}, {**ROWS[1], "completions": [""] * 4}]
    write_pairs(tmp_path / "pairs.json", rows)
    assert main(["inspect", *arguments, "--row=0"]) == 0
    shown = capsys.readouterr().out
    assert "pairs, chosen > rejected (2): 0 > 1, 0 > 3" in shown
    assert "left out of training, 3 more pairs: empty answer" in shown
    assert "left out of training: empty answer" in error_of(
        capsys, ["inspect", *arguments, "--row=1"]
    )
