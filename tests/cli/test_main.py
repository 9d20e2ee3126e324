"""The command line, from its arguments to its exit code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpofast.cli import main
from dpofast.demo.model import make_tokenizer
from tests.cli.runs import PAIRS, error_of, run_arguments, write_pairs
from tests.support import tiny_llama


def run_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own that finds the same packages as this one."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize("arguments", ["--help", "train --help", "ref build --help", "demo --help"])
def test_help_answers_at_once(arguments: str) -> None:
    result = run_process("-X", "importtime", "-m", "dpofast", *arguments.split())
    assert result.returncode == 0
    assert "usage: dpofast" in result.stdout
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert not {"torch", "transformers", "numpy", "rich", "pydantic"} & imported


@pytest.mark.slow
def test_exit_code_of_the_process() -> None:
    result = run_process("-m", "dpofast", "train", "--bata", "1")
    assert result.returncode == 2
    assert result.stderr == (
        "dpofast: error: command line: there is no option 'bata'; did you mean 'beta'?\n"
    )


def test_the_log_of_a_run_has_few_lines_and_no_bars(
    tmp_path: Path, model_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(run_arguments(tmp_path, model_folder)) == 0
    captured = capfd.readouterr()
    assert "\r" not in captured.out + captured.err
    bars = [line for line in captured.err.splitlines() if "%" in line and "/" in line]
    assert len(bars) == 1
    assert bars[0].startswith("reference log-probs (train), 12 answers: 100% ")


def test_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["trian"])
    assert caught.value.code == 2
    assert "dpofast: error: argument COMMAND: invalid choice: 'trian'" in capsys.readouterr().err


def test_interrupt_ends_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dpofast.cli.train.train", interrupted)
    assert main(["train", "run.yaml"]) == 130
    assert capsys.readouterr().err == "dpofast: interrupted\n"


def test_command_alone_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().out


def test_second_run_needs_no_reference_forward(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(run_arguments(tmp_path, model_folder, "--save_strategy=no")) == 0
    first = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert first["ref_forward_passes"] > 0
    assert first["ref_rows_scored"] == 2 * len(PAIRS)
    again = run_arguments(tmp_path, model_folder, "--beta", "0.3", "--loss_type", "ipo")
    assert main(again) == 0
    second = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert second["ref_forward_passes"] == 0
    assert second["ref_store_hits"] == 2 * len(PAIRS)
    assert "0 forward passes" in capsys.readouterr().out


def test_a_summary_that_cannot_be_written_ends_no_run(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "summary.json").mkdir(parents=True)
    assert main(run_arguments(tmp_path, model_folder)) == 0
    assert (tmp_path / "run" / "model.safetensors").is_file()
    printed = "".join(capsys.readouterr().out.splitlines())
    assert "model, README.md, summary.json, metrics.jsonl and training.png: " in printed


def test_yaml_file_trains_an_adapter_and_eval_measures_it(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = run_arguments(tmp_path, model_folder)[1:]
    config = tmp_path / "run.yaml"
    config.write_text("".join(f"{w[2:].replace('=', ': ', 1)}\n" for w in arguments))
    assert main(["train", str(config), "--use_peft", "--lora_r", "2"]) == 0
    adapter = tmp_path / "run"
    assert (adapter / "adapter_config.json").is_file()
    measure = ["eval", str(config), "--model_name_or_path", str(adapter)]
    assert "no held-out pairs" in error_of(capsys, measure)
    assert main([*measure, "--eval_dataset_name", str(tmp_path / "pairs.json")]) == 0
    evaluation = json.loads((adapter / "evaluation.json").read_text())
    assert evaluation["eval_rewards/margins"] != 0, "the base is the reference of an adapter"
    assert "rewards/accuracies" in capsys.readouterr().out


GOOD = {"prompt": "Say it.", "chosen": "yes", "rejected": "no"}


@pytest.mark.parametrize(
    ("rows", "more", "texts"),
    [
        ([{"prompt": "a", "chosen": "b"}], [], ["pairs.json", "rejected"]),
        ([GOOD, GOOD | {"chosen": ""}], ["--strict"], ["pairs.json", "row 1", "chosen", "empty"]),
        ([GOOD, GOOD | {"rejected": 7}], [], ["pairs.json", "row 1", "rejected", "7"]),
        ([{"prompt": "a", "completion": "b", "label": True}], [], ["pairs.json", "label"]),
        ([GOOD, GOOD | {"rejected": "yes"}], ["--strict"], ["pairs.json", "row 1", "identical"]),
        ([GOOD], ["--bata", "1"], ["'bata'", "'beta'"]),
        ([GOOD], ["--beta", "0"], ["beta"]),
        ([GOOD], ["--beta=-0.1"], ["beta"]),
    ],
)
def test_errors_are_one_sentence_that_names_the_place(
    tmp_path: Path,
    model_folder: Path,
    capsys: pytest.CaptureFixture[str],
    rows: list[dict[str, Any]],
    more: list[str],
    texts: list[str],
) -> None:
    arguments = run_arguments(tmp_path, model_folder)
    if not more or more == ["--strict"]:
        write_pairs(tmp_path / "pairs.json", rows)
    sentence = error_of(capsys, [*arguments, *more])
    for text in texts:
        assert text in sentence


def test_broken_json_is_named_by_its_line(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = run_arguments(tmp_path, model_folder)
    (tmp_path / "pairs.json").write_text('[\n{"prompt": "a",\n"chosen" "b"}\n]')
    assert "line 3" in error_of(capsys, arguments)


def test_model_folder_without_a_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bare"
    tiny_llama().save_pretrained(folder)
    sentence = error_of(capsys, run_arguments(tmp_path, folder))
    assert "bare" in sentence
    assert "no tokenizer" in sentence


def test_folder_that_is_no_store(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference" / "notes.txt").write_text("mine")
    assert "not a reference store" in error_of(capsys, run_arguments(tmp_path, model_folder))


def test_evaluation_without_pairs_is_refused_before_the_model_loads(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = run_arguments(tmp_path, model_folder, "--eval_strategy", "epoch")
    assert "eval_strategy is set, but there are no held-out pairs" in error_of(capsys, arguments)


def test_a_reference_that_is_not_the_one_of_the_run_is_refused(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    vocab_size = len(make_tokenizer())
    tiny_llama(seed=7, vocab_size=vocab_size).save_pretrained(other)
    saving = ("--save_strategy=steps", "--save_steps=1")
    first = run_arguments(
        tmp_path, model_folder, *saving, f"--ref_model_name_or_path={model_folder}"
    )
    assert main(first) == 0
    resume = run_arguments(
        tmp_path,
        model_folder,
        "--save_strategy=no",
        f"--ref_model_name_or_path={other}",
        f"--resume_from_checkpoint={tmp_path / 'run' / 'checkpoint-1'}",
    )
    assert "ref_model is not the reference" in error_of(capsys, resume)


def test_resuming_takes_true(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = run_arguments(tmp_path, model_folder, "--resume_from_checkpoint", "true")
    assert "no whole checkpoint" in error_of(capsys, arguments)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--lora_r=4", "use_peft"),
        ("--output_dir=pairs.json", "output_dir"),
        ("--loss_type=dpo", "command line: loss_type: Unknown loss"),
        ("--num_train_epochs=-1", "num_train_epochs"),
        ("--report_to=tensorbord", "report_to"),
        ("--attn_implementation=flash_attention_2", "can't be loaded"),
    ],
)
def test_options_that_would_fail_later_are_named(
    tmp_path: Path,
    model_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    name = option.partition("=")[0]
    arguments = [w for w in run_arguments(tmp_path, model_folder) if not w.startswith(f"{name}=")]
    assert message in error_of(capsys, [*arguments, option])


def test_a_truncated_model_file_is_named(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model_folder, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "can't be loaded" in error_of(capsys, run_arguments(tmp_path, broken))


@pytest.mark.parametrize("option", ["model_name_or_path", "ref_model_name_or_path"])
def test_pickled_weights_are_refused_before_the_data_is_read(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    pickled = tmp_path / "pickled"
    shutil.copytree(model_folder, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    arguments = run_arguments(tmp_path, model_folder, f"--ref_model_name_or_path={model_folder}")
    kept = [part for part in arguments if not part.startswith(f"--{option}=")]
    arguments = [*kept, f"--{option}={pickled}"]
    (tmp_path / "pairs.json").unlink()
    sentence = error_of(capsys, arguments)
    assert f"{str(pickled)!r} has its weights as pytorch_model.bin" in sentence
    assert "python -c 'from transformers import" in sentence


def test_an_adapter_may_be_pickled(tmp_path: Path, model_folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    folder = tmp_path / "adapter"
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    weights = folder / "adapter_model.safetensors"
    torch.save(load_file(weights), folder / "adapter_model.bin")
    weights.unlink()
    assert main(run_arguments(tmp_path, folder)) == 0
