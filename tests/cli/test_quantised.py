"""`load_in_4bit` and `load_in_8bit` on the command line and in YAML."""

from __future__ import annotations

import json

import pytest
import yaml

from dpofast.cli import main
from dpofast.cli.run_options import read_options
from dpofast.errors import ConfigError
from tests.cli.runs import PAIRS, error_of, write_pairs
from tests.quantised import save_base

pytest.importorskip("peft", reason="needs the extra `peft`")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


def yaml_file(folder, base, **options):
    given = {
        "model_name_or_path": str(base),
        "dataset_name": str(write_pairs(folder / "pairs.json", PAIRS)),
        "output_dir": str(folder / "run"),
        "reference_store": str(folder / "reference"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "load_in_4bit": True,
        "use_peft": True,
        "lora_target_modules": ["q_proj", "v_proj"],
        **options,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in given.items() if v is not None}))
    return str(path)


def test_a_run_its_evaluation_and_the_next_run_of_its_adapter(tmp_path, base, capsys):
    path = yaml_file(tmp_path, base, use_bnb_nested_quant=True)
    assert main(["train", path]) == 0
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert main(["ref", "build", path]) == 0
    assert "12 answers: 12 found, 0 scored" in capsys.readouterr().out
    adapter = ["--model_name_or_path", str(tmp_path / "run"), "--output_dir", str(tmp_path / "two")]
    own = {"use_peft": None, "lora_target_modules": None}
    without = yaml_file(tmp_path, base, use_bnb_nested_quant=True, **own)
    held_out = ["--eval_dataset_name", str(tmp_path / "pairs.json")]
    assert main(["eval", without, *adapter, *held_out]) == 0
    measured = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    assert measured["ref_rows_scored"] == 0  # the base is the reference of the run
    assert measured["eval_logratios/chosen"] != 0.0
    assert main(["train", without, *adapter]) == 0


def test_the_options_become_a_quantization_config(tmp_path, base):
    def config(**options):
        path = yaml_file(tmp_path, base, **options)
        return read_options(path, []).config.model_init_kwargs["quantization_config"]

    assert config() == {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": None,
        "bnb_4bit_quant_storage": None,
    }
    assert config(dtype="bfloat16")["bnb_4bit_compute_dtype"] == "bfloat16"
    assert config(dtype="auto")["bnb_4bit_compute_dtype"] is None
    more = {"dtype": "bfloat16", "bnb_4bit_compute_dtype": "float16", "bnb_4bit_quant_type": "fp4"}
    found = config(**more, bnb_4bit_quant_storage="bfloat16", use_bnb_nested_quant=True)
    assert list(found.values()) == [True, "fp4", True, "float16", "bfloat16"]
    assert config(load_in_4bit=None, load_in_8bit=True) == {"load_in_8bit": True}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_in_8bit": True}, "load_in_4bit and load_in_8bit are both set; keep one"),
        (
            {"load_in_4bit": None, "use_bnb_nested_quant": True},
            "use_bnb_nested_quant has no effect without load_in_4bit: true",
        ),
        ({"bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type: got 'int4', expected one of fp4"),
        ({"bnb_4bit_quant_storage": "float3"}, "bnb_4bit_quant_storage: got 'float3'"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(tmp_path, base, options, message):
    with pytest.raises(ConfigError, match=message):
        read_options(yaml_file(tmp_path, base, **options), [])


def test_full_training_is_refused_before_anything_is_loaded(tmp_path, base, capsys):
    path = yaml_file(tmp_path, base / "missing", use_peft=None, lora_target_modules=None)
    assert "load_in_4bit needs use_peft: true" in error_of(capsys, ["train", path])
