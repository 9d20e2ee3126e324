"""Names and values become checked options, or are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpofast.cli.run_options import RunOptions, read_options
from dpofast.errors import ConfigError


def read(folder: Path, text: str, *overrides: str) -> RunOptions:
    path = folder / "run.yaml"
    path.write_text(text + "use_cpu: true\nbf16: false\n", encoding="utf-8")
    return read_options(str(path), overrides)


def test_options_reach_the_script_and_the_config(tmp_path: Path) -> None:
    text = "model_name_or_path: some/model\ntorch_dtype: bfloat16\nlearning_rate: 5e-7\nbeta: 0.3\n"
    options = read(tmp_path, text, "--beta", "0.2", "--train_file", "pairs.json")
    assert options.script.dataset_name == "pairs.json"
    assert options.config.learning_rate == 5e-7
    assert options.config.beta == 0.2, "the command line wins"
    assert options.config.model_init_kwargs == {"dtype": "bfloat16"}
    assert options.config.output_dir == "model-DPO"


def test_training_shows_its_progress_unless_it_is_switched_off(tmp_path: Path, monkeypatch) -> None:
    # A command sets this level, from which transformers would conclude that bars aren't wanted.
    monkeypatch.setattr("transformers.training_args.logger.getEffectiveLevel", lambda: 40)
    assert read(tmp_path, "").config.disable_tqdm is False
    assert read(tmp_path, "disable_tqdm: true\n").config.disable_tqdm is True


def test_option_of_trl_that_changes_nothing_is_taken(tmp_path: Path) -> None:
    assert read(tmp_path, "use_weighting: false\n").config.max_length == 1024


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("bata: 0.1", r"run.yaml: there is no option 'bata'; did you mean 'beta'\?"),
        ("lora_rank: 8", r"run.yaml: lora_rank isn't an option here: write lora_r\."),
        ("zzzz: 1", "there is no option 'zzzz'; see docs/configuration.md"),
        ("beta: 0", "run.yaml: beta"),
        ("beta: -1", "run.yaml: beta"),
        ("beta: [1, 2]", r"run.yaml: beta: got \[1, 2\], expected a number"),
        ("per_device_train_batch_size: 0", "run.yaml: per_device_train_batch_size: got 0"),
        ("loss_type: ipa", "run.yaml: .*ipa"),
        ("eval_strategy: sometimes", "run.yaml: eval_strategy: got 'sometimes', expected"),
        ("max_prompt_length: 0", "run.yaml: max_prompt_length: got 0, expected a whole number"),
        ("evaluation_strategy: now and then", "evaluation_strategy: got 'now and then', expected"),
        ("load_in_4bit: true", "load_in_4bit isn't an option here"),
        ("dtype: float8", "run.yaml: dtype: got 'float8', expected one of auto, bfloat16"),
        ("train_file: a\ndataset_name: b", "train_file and dataset_name are one option"),
    ],
)
def test_refuses_with_the_file_the_option_and_the_remedy(
    tmp_path: Path, line: str, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        read(tmp_path, f"{line}\n")


def test_an_override_is_blamed_on_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="command line: beta"):
        read(tmp_path, "seed: 1\n", "--beta", "-1")


def test_missing_option_is_named(tmp_path: Path) -> None:
    options = read(tmp_path, "seed: 1\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: model_name_or_path is missing"):
        options.require("model_name_or_path")
