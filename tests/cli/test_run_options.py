"""Names and values become checked options, or are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import T5Config

from dpofast.cli.inputs import adapter_options
from dpofast.cli.run_options import RunOptions, read_options
from dpofast.errors import ConfigError, ModelError


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


def test_arguments_of_from_pretrained_may_be_json_beside_options_of_their_own(
    tmp_path: Path,
) -> None:
    text = """model_init_kwargs: '{"use_cache": false}'\nmodel_revision: v2\ndtype: float16\n"""
    arguments = read(tmp_path, text).config.model_init_kwargs
    assert arguments == {"use_cache": False, "revision": "v2", "dtype": "float16"}


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
        ("quantization_bit: 4", "quantization_bit isn't an option here: set load_in_4bit or"),
        ("load_in_4bits: true", "no option 'load_in_4bits'; did you mean 'load_in_4bit'"),
        (
            "dtype: float16\nmodel_init_kwargs: {torch_dtype: bfloat16}",
            "run.yaml: model_init_kwargs: its dtype isn't what the option dtype sets; give it",
        ),
        (
            "load_in_4bit: true\nmodel_init_kwargs: {quantization_config: {load_in_8bit: true}}",
            "model_init_kwargs: its quantization_config isn't what the option load_in_4bit sets",
        ),
        ("model_init_kwargs: '[1]'", "run.yaml: model_init_kwargs: got .* expected a mapping"),
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


def test_all_unknown_names_come_in_one_error_with_their_lines(tmp_path: Path) -> None:
    text = "base_model: some/model\nbeta: 0.1\nlerning_rate: 1e-6\nstreaming: false\n"
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text, "--cutoff-len", "2048")
    file = tmp_path / "run.yaml"
    assert str(caught.value).splitlines() == [
        "3 options can't be used:",
        f"  {file}, line 1: base_model isn't an option here: write model_name_or_path.",
        f"  {file}, line 3: there is no option 'lerning_rate'; did you mean 'learning_rate'?",
        "  command line: cutoff_len isn't an option here: write max_length.",
    ]


def test_several_options_that_would_change_the_training_come_in_one_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, "rpo_alpha: 1.0\nreference_free: true\n")
    first, *lines = str(caught.value).splitlines()
    assert first == f"{tmp_path / 'run.yaml'}: 2 options can't be used:"
    assert sorted(line.split("=")[0].strip() for line in lines) == ["reference_free", "rpo_alpha"]


@pytest.mark.parametrize(
    "name", ["datasets: [a]", "lora_task: x", "chosen_response: x", "tools_: 1"]
)
def test_a_name_that_only_looks_alike_is_not_suggested(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, f"{name}\n")
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("option", ["is_encoder_decoder: true", "max_seq_len: 7", "beta: -1"])
@pytest.mark.parametrize("which", ["model_name_or_path", "ref_model_name_or_path", "base_model"])
def test_the_kind_of_a_model_is_refused_before_its_options(
    tmp_path: Path, option: str, which: str
) -> None:
    config = T5Config(architectures=["T5ForConditionalGeneration"])
    config.save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError, match=f"run.yaml: {which}: The model .* is an encoder-decoder"):
        read(tmp_path, f"{which}: {tmp_path / 't5'}\n{option}\n")


@pytest.mark.parametrize(
    ("given", "expected"),
    [("q_proj", {"q_proj"}), ("all-linear", "all-linear"), (r".*\.q_proj", r".*\.q_proj")],
)
def test_a_module_with_an_adapter_may_be_named_without_a_list(
    tmp_path: Path, given: str, expected: object
) -> None:
    pytest.importorskip("peft", reason="needs the extra `peft`")
    adapter = adapter_options(read(tmp_path, f"use_peft: true\nlora_target_modules: {given}\n"))
    assert adapter.target_modules == expected


def test_the_adapters_options_are_those_of_trl(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="needs the extra `peft`")
    text = (
        "use_peft: true\nlora_r: 4\nuse_rslora: true\nuse_dora: true\nlora_task_type: CAUSAL_LM\n"
        "lora_target_parameters: [mlp.experts.gate_up_proj]\n"
    )
    adapter = adapter_options(read(tmp_path, text))
    assert (adapter.r, adapter.use_rslora, adapter.use_dora) == (4, True, True)
    assert adapter.target_parameters == ["mlp.experts.gate_up_proj"]
    assert adapter.task_type == "CAUSAL_LM"
    with pytest.raises(ConfigError, match="got 'SEQ_CLS', expected one of CAUSAL_LM"):
        read(tmp_path, "use_peft: true\nlora_task_type: SEQ_CLS\n")
    for idle in ("use_dora: true", "use_rslora: true", "lora_task_type: CAUSAL_LM"):
        with pytest.raises(ConfigError, match="has no effect without use_peft"):
            read(tmp_path, f"{idle}\n")
