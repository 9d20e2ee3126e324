"""`dpofast inspect`, from the command line to what it prints."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from dpofast.cli import main
from dpofast.cli.run_options import read_options
from dpofast.cli.train import make_trainer
from dpofast.demo.model import make_tokenizer
from tests.cli.runs import PAIRS, error_of, write_pairs
from tests.families import tiny_model
from tests.support import tiny_llama


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's config and tokenizer, without its weights."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = make_tokenizer()
    tiny_llama(vocab_size=len(tokenizer)).config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def command(tmp_path: Path, model_folder: Path) -> list[str]:
    """`dpofast inspect` for a run of two epochs, with 4 pairs in a step and two steps an epoch."""
    config = tmp_path / "run.yaml"
    data = write_pairs(tmp_path / "pairs.json", PAIRS)
    options = {
        "model_name_or_path": model_folder,
        "dataset_name": data,
        "output_dir": tmp_path / "run",
        "reference_store": tmp_path / "store",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_tokens_per_microbatch": 24,
        "num_train_epochs": 2,
        "report_to": "none",
        "use_cpu": "true",
        "bf16": "false",
    }
    config.write_text("".join(f"{name}: {value}\n" for name, value in options.items()))
    return ["inspect", str(config)]


def pairs_and_tokens(text: str) -> list[tuple[int, int]]:
    found = re.findall(r"^(\d+) pairs? in (\d+) tokens", text, flags=re.MULTILINE)
    return [(int(pairs), int(tokens)) for pairs, tokens in found]


def test_rows_are_those_that_training_runs(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The third step is the first of the second epoch."""
    capsys.readouterr()
    assert main([*command, "--step", "2"]) == 0
    shown = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    vocab_size = len(make_tokenizer())
    folder = tmp_path / "whole"
    tiny_llama(vocab_size=vocab_size).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    options = read_options(command[1], [f"--model_name_or_path={folder}"])
    loader = make_trainer(options).get_train_dataloader()
    loader.set_epoch(1)
    step = next(iter(loader))
    expected = [(batch.num_pairs, batch.num_body_tokens) for batch in step.micro_batches]
    assert len(expected) > 1
    assert pairs_and_tokens(shown) == expected
    assert "step 2 (epoch 1), rank 0 of 1: 4 of the step's 4 pairs" in shown
    assert f"row {len(expected) - 1} of {len(expected)}" in shown


def test_a_step_has_all_pairs_of_its_prompts(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two prompts of three pairs each, which don't follow each other."""
    pairs = [{**pair, "prompt": f"Say {index % 2}: "} for index, pair in enumerate(PAIRS)]
    data = write_pairs(tmp_path / "two.json", pairs)
    command = [*command, f"--dataset_name={data}", "--group_by_prompt=true"]
    command += ["--per_device_train_batch_size=1", "--num_train_epochs=1"]
    numbers = []
    for step in range(2):
        assert main([*command, f"--step={step}"]) == 0
        shown = capsys.readouterr().out
        assert "3 of the step's 3 pairs" in shown
        numbers.append(sorted(map(int, re.findall(r"^pair (\d+)$", shown, flags=re.MULTILINE))))
    assert sorted(numbers) == [[0, 2, 4], [1, 3, 5]]
    assert "the run's steps are 0 to 1." in error_of(capsys, [*command, "--step=2"])


@pytest.mark.parametrize("losses", [["sigmoid", "sft"], ["orpo"]])
def test_a_step_of_a_loss_with_a_likelihood_term_is_shown(
    command: list[str], capsys: pytest.CaptureFixture[str], losses: list[str]
) -> None:
    """Rows don't depend on the loss."""
    shown = []
    for own in ([], ["--loss_type", *losses]):
        assert main([*command, "--step=1", *own]) == 0
        shown.append(capsys.readouterr().out)
    assert pairs_and_tokens(shown[0]) == pairs_and_tokens(shown[1])


def test_ranks_share_a_step(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for rank in range(2):
        assert main([*command, "--step=0", f"--rank={rank}/2"]) == 0
        shown.append(capsys.readouterr().out)
        assert f"step 0 (epoch 0), rank {rank} of 2:" in shown[-1]
    numbers = [re.findall(r"^pair (\d+)$", text, flags=re.MULTILINE) for text in shown]
    assert sorted(map(int, numbers[0] + numbers[1])) == list(range(6))


def test_a_pair_is_shown_by_its_row(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--row", "3"]) == 0
    assert "row 3" in capsys.readouterr().out


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_an_unpaired_row_is_shown_and_the_labels_are_counted(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], streaming: str
) -> None:
    rows = [{"prompt": "a", "response": "b", "label": number % 2} for number in range(3)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    command = [*command, f"--dataset_name={path}", f"--dataset_streaming={streaming}"]
    command.append('--dataset_columns={"completion": "response"}')
    assert main([*command, "--row=1"]) == 0
    shown = capsys.readouterr().out
    assert "3 unpaired rows: 1 desirable, 2 undesirable" in shown
    assert "row 1 (counted from 0): prompt 1 tokens, completion 2; desirable" in shown
    assert "completion, scored" in shown
    sentence = error_of(capsys, [*command, "--step=0", "--max_steps=1"])
    assert "rows.jsonl holds unpaired rows" in sentence
    assert "loss_type kto" in sentence


def test_a_pair_is_shown_with_what_the_options_cut(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    limits = ["--max_prompt_length=2", "--max_target_length=1"]
    assert main([*command, "--row=3", *limits]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "max_prompt_length 2, max_completion_length 1, max_length 1024 (keep_start): cut" in shown
    )
    assert "prompt, cut on the left" in shown


def test_an_adapter_is_laid_out_as_its_base(
    command: list[str], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_llama(vocab_size=len(make_tokenizer()))
    model.name_or_path = model.config._name_or_path = str(model_folder)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.1))
    adapted.save_pretrained(tmp_path / "adapter")
    make_tokenizer().save_pretrained(tmp_path / "adapter")
    command = [*command, f"--model_name_or_path={tmp_path / 'adapter'}", "--step=0"]
    assert main(command) == 0
    assert "Layout: shared" in capsys.readouterr().out
    sentence = error_of(capsys, [*command, "--disable_dropout=false"])
    assert "padded, as Dropout has a dropout above 0" in sentence


def test_a_model_that_is_padded_has_no_packed_rows(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mamba"
    tiny_model("mamba").config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    command = [*command, "--step=0", f"--model_name_or_path={folder}"]
    assert "layout is padded, as its layers with a state or a conv" in error_of(capsys, command)
    assert "'shared' would be wrong here" in error_of(capsys, [*command, "--layout=shared"])


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--step=4"], "--step: got 4, but the run's steps are 0 to 3."),
        (["--step=-1"], "--step: got -1, but the run's steps are 0 to 3."),
        (["--step", "x"], "command line: --step: got 'x', expected a whole number."),
        (["--step=0", "--layout=padded"], "the run's layout is padded, as it was asked for"),
        (["--step=0", "--rank=2/2"], "--rank: got '2/2', expected a rank, counted from 0"),
        (["--step=0", "--rank=1"], "--rank: got 1, expected a rank, counted from 0"),
        (["--rank=0/2"], "--rank says whose part of a step is shown: give --step, too."),
        (["--row=0", "--step=0"], "give one of them"),
        (["--row=0", "--row=1"], "--row is given twice"),
        (["--row=6"], "--row: got 6, but the data's rows are 0 to 5."),
        (["--stpe=0"], "there is no option 'stpe'; did you mean 'step'?"),
        (["--step=0", "--model_name_or_path=/nowhere"], "'/nowhere' does not exist"),
    ],
)
def test_errors_name_the_option(
    command: list[str], capsys: pytest.CaptureFixture[str], more: list[str], sentence: str
) -> None:
    command = [command[0], command[1], *more]
    assert sentence in error_of(capsys, command)


def test_its_own_options_do_not_belong_into_the_file(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(command[1])
    path.write_text(path.read_text() + "step: 0\n")
    assert "run.yaml: step belongs on the command line, as `--step N`" in error_of(capsys, command)


def test_a_broken_config_is_named(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "broken"
    make_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "nothing known"}')
    sentence = error_of(capsys, [*command, "--step=0", f"--model_name_or_path={folder}"])
    assert "broken' can't be built from its config" in sentence
