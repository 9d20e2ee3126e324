"""Mixtures and splits, from the options to what the commands train and measure on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dpofast import DPOTrainer
from dpofast.cli import main
from dpofast.cli.run_data import load_all_rows, load_held_out_data, load_training_data
from dpofast.cli.run_options import RunOptions, read_options
from dpofast.data import rows_by_source
from dpofast.errors import DataError
from tests.cli.runs import error_of, run_arguments, write_pairs


def rows(words: list[str]) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Say {word}.", "chosen": f"{word} {number}", "rejected": f"no {word}"}
        for number, word in enumerate(words)
    ]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Two files that share four prompts; the first has two pairs of most prompts."""
    first = [f"a{number // 2}" for number in range(36)]
    second = [f"a{number}" for number in range(4)] + [f"b{number}" for number in range(16)]
    paths = [tmp_path / "first.json", tmp_path / "second.json"]
    for path, words in zip(paths, (first, second), strict=True):
        write_pairs(path, rows(words))
    return [str(path) for path in paths]


def read(*arguments: str) -> RunOptions:
    return read_options(None, ["--use_cpu", "--bf16=false", *arguments])


def mixed(files: list[str], *more: str) -> RunOptions:
    """Options for a mixture of the files, of which a quarter is held out."""
    shares = ["--dataset_shares", "0.6", "0.4", "--eval_split", "0.25"]
    return read("--dataset_name", *files, *shares, *more)


def test_names_and_shares_are_lists_or_one_name(files: list[str], tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"dataset_name: {files}\ndataset_shares: [3, 1e-1]\nuse_cpu: true\n")
    script = read_options(str(config), ["--bf16=false"]).script
    assert script.dataset_names == files
    assert script.dataset_shares == [3.0, 0.1]
    as_json = read("--dataset_name", json.dumps(files)).script
    assert as_json.dataset_names == read("--dataset_name", *files).script.dataset_names == files
    assert read("--train_file", files[0]).script.dataset_names == [files[0]]
    assert read("--dataset_name", files[0]).script.dataset_name == files[0]


def test_all_pairs_without_shares(files: list[str]) -> None:
    options = read("--dataset_name", *files)
    assert rows_by_source(load_training_data(options)) == {files[0]: 36, files[1]: 20}
    assert load_held_out_data(options) is None


def test_a_single_dataset_is_read_as_before(files: list[str]) -> None:
    options = read("--dataset_name", files[0], "--dataset_shares", "[0.5]")
    pairs = load_training_data(options)
    assert len(pairs) == 36
    assert "source" not in pairs.column_names


def test_the_split_is_by_prompt_and_has_the_shares_in_both_parts(files: list[str]) -> None:
    options = mixed(files)
    training, held = load_training_data(options), load_held_out_data(options)
    assert set(training["prompt"]).isdisjoint(held["prompt"])
    for part in (training, held):
        counts = rows_by_source(part)
        assert abs(counts[files[0]] - 0.6 * len(part)) < 1
        assert abs(counts[files[1]] - 0.4 * len(part)) < 1
    assert training[:] == load_training_data(mixed(files))[:]
    assert training[:] != load_training_data(mixed(files, "--seed", "7"))[:]


def test_weights_of_datasets_reach_training_and_held_out_pairs(files: list[str]) -> None:
    options = read("--dataset_name", *files, "--dataset_weights", "1", "0.5", "--eval_split=0.25")
    for part in (load_training_data(options), load_held_out_data(options)):
        weights = set(zip(part["source"], part["weight"], strict=True))
        assert weights == {(files[0], 1.0), (files[1], 0.5)}
    single = load_training_data(read("--dataset_name", files[0], "--dataset_weights", "0.5"))
    assert single["weight"] == [0.5] * 36


def test_a_named_split_is_taken_whole_from_every_dataset(tmp_path: Path) -> None:
    folders = []
    for name, count in (("x", 3), ("y", 5)):
        folder = tmp_path / name
        folder.mkdir()
        write_pairs(folder / "train.json", rows([f"{name}{row}" for row in range(4)]))
        write_pairs(folder / "test.json", rows([f"test {name}{row}" for row in range(count)]))
        folders.append(str(folder))
    options = read(
        *("--dataset_name", *folders, "--dataset_shares", "0.5", "0.5"),
        *("--dataset_test_split", "test"),
    )
    assert rows_by_source(load_held_out_data(options)) == {folders[0]: 3, folders[1]: 5}
    assert rows_by_source(load_training_data(options)) == {folders[0]: 4, folders[1]: 4}


def test_rows_keep_their_numbers_whatever_is_held_out(files: list[str]) -> None:
    single = read("--dataset_name", files[0], "--eval_split", "0.25")
    assert load_all_rows(single, 35)["row"] == list(range(36))
    assert load_all_rows(mixed(files), 35)["row"] == [*range(36), *range(20)]


def test_rows_left_out_are_reported_but_do_not_count(files: list[str], tmp_path: Path) -> None:
    content = json.loads(Path(files[1]).read_text())
    content[3]["chosen"], content[7]["rejected"] = " ", 5
    write_pairs(Path(files[1]), content)
    options = mixed(files, "--skip_bad_rows")
    training, held = load_training_data(options), load_held_out_data(options)
    found = {(row["source"], row["row"]): row["left_out"] for row in training if row["left_out"]}
    assert found == {(files[1], 3): "empty answer", (files[1], 7): "bad row"}
    assert not any(row["left_out"] for row in held)
    for part in (training, held):
        counts = rows_by_source(part)
        assert abs(counts[files[1]] - 0.4 * sum(counts.values())) < 1
    with pytest.raises(DataError, match=r"second\.json, row 7"):
        load_training_data(mixed(files))


NAMES = ("loss", "eval_loss")
LONG_RUN = ("--max_steps=6", "--save_strategy=steps", "--save_steps=2", "--eval_strategy=steps")


def mixture_run(folder: Path, model_folder: Path, files: list[str]) -> list[str]:
    """Arguments of a run on a mixture with held-out pairs, of six steps, with three checkpoints."""
    arguments = run_arguments(folder, model_folder, *LONG_RUN, "--eval_steps=2")
    arguments = [text for text in arguments if not text.startswith(("--dataset", "--max_steps=2"))]
    return [*arguments, "--dataset_name", *files, "--dataset_shares=[0.6, 0.4]", "--eval_split=0.2"]


def losses(folder: Path) -> list[tuple[int, str, float]]:
    """(step, name, value) of all losses of steps and evaluations that a run has logged."""
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    logs = [json.loads(line) for line in lines]
    return [(log["step"], name, log[name]) for log in logs for name in NAMES if name in log]


@pytest.fixture
def unbroken(tmp_path: Path, model_folder: Path, files: list[str]) -> list[tuple[int, str, float]]:
    """The losses of a run that nothing stops."""
    folder = tmp_path / "unbroken"
    folder.mkdir()
    assert main(mixture_run(folder, model_folder, files)) == 0
    found = losses(folder)
    assert [step for step, name, _ in found if name == "loss"] == [1, 2, 3, 4, 5, 6]
    assert [step for step, name, _ in found if name == "eval_loss"] == [2, 4, 6]
    return found


def test_a_stopped_run_goes_on_with_the_same_pairs(
    tmp_path: Path,
    model_folder: Path,
    files: list[str],
    unbroken: list[tuple[int, str, float]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = mixture_run(tmp_path, model_folder, files)
    step = DPOTrainer.training_step

    def stopped(self: DPOTrainer, *inputs: Any, **more: Any) -> Any:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *inputs, **more)

    with monkeypatch.context() as patch:
        patch.setattr(DPOTrainer, "training_step", stopped)
        assert main(arguments) == 130
    capsys.readouterr()
    assert main([*arguments, "--resume_from_checkpoint=true"]) == 0
    log = capsys.readouterr().err
    assert losses(tmp_path) == unbroken
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["ref_forward_passes"] == 0
    for name, part in (("train", "training pairs"), ("eval", "held-out pairs")):
        sources = summary["data"][name]["sources"]
        assert set(sources) == set(files)
        assert sum(sources.values()) == summary["data"][name]["pairs_read"]
        assert f"{part}: {sum(sources.values())} pairs, {sources[files[0]]} of " in log


@pytest.mark.slow  # starts PyTorch twice
def test_a_killed_run_goes_on_with_the_same_pairs(
    tmp_path: Path, model_folder: Path, files: list[str], unbroken: list[tuple[int, str, float]]
) -> None:
    arguments = mixture_run(tmp_path, model_folder, files)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "dpofast", *arguments]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as killed:
        deadline = time.monotonic() + 240
        while not (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").is_file():
            assert killed.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        killed.send_signal(signal.SIGKILL)
    assert not (tmp_path / "run" / "summary.json").exists()
    resumed = [*command, "--resume_from_checkpoint=true"]
    subprocess.run(resumed, env=environment, check=True, capture_output=True)
    assert losses(tmp_path) == unbroken


def test_all_commands_use_the_same_split(
    tmp_path: Path,
    model_folder: Path,
    files: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = mixture_run(tmp_path, model_folder, files)[1:]
    options = read_options(None, arguments)
    training, held = load_training_data(options), load_held_out_data(options)
    assert main(["ref", "build", *arguments]) == 0
    answers = {
        (row["prompt"], row[name])
        for part in (training, held)
        for row in part
        for name in ("chosen", "rejected")
    }
    assert f"{len(answers)} scored" in capsys.readouterr().out
    against = f"--ref_model_name_or_path={model_folder}"
    assert main(["eval", *arguments, against]) == 0
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert evaluation["data"]["eval"]["sources"] == rows_by_source(held)
    assert evaluation["ref_rows_scored"] == 0
    capsys.readouterr()
    assert main(["inspect", *arguments, "--row", "19"]) == 0
    shown = "".join(capsys.readouterr().out.split())
    assert all(shown.count(file) == 1 for file in files), "each has a row of this number"
    assert main(["inspect", *arguments, "--row", "35"]) == 0
    assert files[1] not in "".join(capsys.readouterr().out.split())
    sentence = error_of(capsys, ["inspect", *arguments, "--row=36"])
    assert "the data's rows are 0 to 35" in sentence
    assert main(["inspect", *arguments, "--step=0", "--max_tokens_per_microbatch=64"]) == 0
    shown = capsys.readouterr().out
    assert "step 0 (epoch 0), rank 0 of 1: 2 of the step's 2 pairs" in shown
    assert len(re.findall(r"pair\d+of/", "".join(shown.split()))) == 2
    sentence = error_of(capsys, ["ref", "export", *arguments, "--output=x.jsonl"])
    assert "dataset_name names 2 datasets" in sentence
    assert f"`--dataset_name {files[0]} --dataset_shares null`" in sentence


def test_ref_export_writes_the_training_pairs_of_a_split(
    tmp_path: Path, model_folder: Path, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"--dataset_name={files[0]}", "--eval_split=0.25"]
    run = [text for text in run_arguments(tmp_path, model_folder)[1:] if "dataset_name" not in text]
    output = tmp_path / "pairs.jsonl"
    assert main(["ref", "build", *run, *arguments]) == 0
    log = capsys.readouterr().err
    assert "Training doesn't measure on the held-out pairs unless eval_strategy is set" in log
    assert main(["ref", "export", *run, *arguments, f"--output={output}"]) == 0
    written = [json.loads(line)["prompt"] for line in output.read_text().splitlines()]
    assert written == load_training_data(read(*arguments))["prompt"]
    assert len(written) == 28


def test_a_split_that_leaves_nothing_is_named(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = run_arguments(tmp_path, model_folder, "--eval_split=0.5")
    write_pairs(tmp_path / "pairs.json", rows(["one", "one"]))
    assert "pairs.json: no pairs can be held out" in error_of(capsys, arguments)
