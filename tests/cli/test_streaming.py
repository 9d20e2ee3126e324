"""`dataset_streaming` in every command that reads pairs."""

from __future__ import annotations

import json

from dpofast.cli import main
from tests.cli.runs import PAIRS, error_of, write_pairs
from tests.cli.runs import run_arguments as arguments_of_two_steps

STREAMING = ("--dataset_streaming=true", "--train_sampling_strategy=sequential")


def run_arguments(folder, model_folder, *more, steps=5):
    given = arguments_of_two_steps(folder, model_folder, *more)
    return [f"--max_steps={steps}" if word == "--max_steps=2" else word for word in given]


def losses(folder):
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [log["loss"] for log in map(json.loads, lines) if "grad_norm" in log]


def test_a_streamed_file_trains_as_a_file_that_is_read_first(tmp_path, model_folder, capsys):
    arguments = run_arguments(tmp_path, model_folder, STREAMING[1])
    assert main(arguments) == 0
    expected = losses(tmp_path)
    rows = [{"question": row["prompt"], **row} for row in PAIRS]
    for row in rows:
        del row["prompt"]
    arguments = run_arguments(tmp_path, model_folder, *STREAMING)
    write_pairs(tmp_path / "pairs.json", rows)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    columns = '--dataset_columns={"prompt": "question"}'
    assert main(["ref", "build", *arguments[1:], columns]) == 0
    assert "12 answers: 12 found, 0 scored" in capsys.readouterr().out
    assert main([*arguments, columns, "--overwrite_output_dir=true"]) == 0
    assert losses(tmp_path) == expected
    capsys.readouterr()
    assert main(["inspect", *arguments[1:], columns, "--step=4", "--rank=1/2"]) == 0
    assert "step 4 (epoch 2), rank 1 of 2" in capsys.readouterr().out
    assert main(["inspect", *arguments[1:], columns, "--row=5"]) == 0
    assert "s|i|x" in capsys.readouterr().out


def test_options_that_need_all_pairs_at_once_are_refused(tmp_path, model_folder, capsys):
    def error(*options, command=(), steps=5):
        arguments = run_arguments(tmp_path, model_folder, *STREAMING, *options, steps=steps)
        return error_of(capsys, [*command, *arguments[1:]] if command else arguments)

    assert "eval_split can't hold pairs out of a stream" in error("--eval_split=1")
    assert "dataset_shares can't be taken of streams" in error("--dataset_shares=[1]")
    assert "dataset_weights weighs several datasets" in error("--dataset_weights=[1]")
    other = str(write_pairs(tmp_path / "other.json", PAIRS))
    arguments = run_arguments(tmp_path, model_folder, *STREAMING)
    several = f'--dataset_name=["{tmp_path / "pairs.json"}", "{other}"]'
    arguments = [several if word.startswith("--dataset_name=") else word for word in arguments]
    several = error_of(capsys, arguments)
    assert "dataset_streaming reads one dataset, and dataset_name names 2" in several
    assert "max_steps: train is a stream" in error(steps=-1)
    output = f"--output={tmp_path / 'out.jsonl'}"
    assert "dataset_streaming can't be exported" in error(output, command=("ref", "export"))
