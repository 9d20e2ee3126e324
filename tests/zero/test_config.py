"""The option `deepspeed` takes names, files, JSON and mappings, and refuses unusable ones."""

from __future__ import annotations

import copy
import json

import pytest

from dpofast.errors import ConfigError
from dpofast.zero.config import BATCH_FIELDS, NAMES, read_deepspeed

OWN = {"zero_optimization": {"stage": 2}, "train_batch_size": 8}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_configuration_that_accumulates_in_float32(name):
    config = read_deepspeed(name)
    zero = config["zero_optimization"]
    assert name.startswith(f"zero{zero['stage']}")
    assert config["data_types"]["grad_accum_dtype"] == "fp32"
    assert ("offload_optimizer" in zero) is name.endswith("_offload")
    assert ("offload_param" in zero) is (name == "zero3_offload")
    assert {config[field] for field in (*BATCH_FIELDS, "gradient_clipping")} == {"auto"}
    assert config["bf16"] == config["fp16"] == {"enabled": "auto"}
    if zero["stage"] == 3:
        assert zero["stage3_gather_16bit_weights_on_model_save"] is True


def test_a_file_a_mapping_and_json_are_read_alike_and_not_changed(tmp_path):
    file = tmp_path / "own.json"
    file.write_text(json.dumps(OWN))
    own = copy.deepcopy(OWN)
    read = read_deepspeed(own)
    assert read == read_deepspeed(str(file)) == read_deepspeed(file)
    assert read == read_deepspeed(json.dumps(OWN))
    assert own == OWN == json.loads(file.read_text())
    assert read["train_batch_size"] == 8


def test_what_is_left_out_comes_from_the_options():
    assert read_deepspeed(OWN)["gradient_clipping"] == "auto"
    assert read_deepspeed(OWN | {"gradient_clipping": 0.5})["gradient_clipping"] == 0.5
    assert read_deepspeed(OWN | {"bf16": {"enabled": False}})["bf16"] == {"enabled": False}


@pytest.mark.parametrize("kept", [{}, {"stage3_gather_16bit_weights_on_model_save": False}])
def test_zero3_saves_whole_models_unless_told_not_to(kept):
    zero = read_deepspeed({"zero_optimization": {"stage": 3, **kept}})["zero_optimization"]
    assert zero["stage3_gather_16bit_weights_on_model_save"] is not bool(kept)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("zero4", "there is no 'zero4'; name a JSON file, or one of"),
        ("zero3_ofload", "did you mean 'zero3_offload'"),
        ("ZeRO-2", "did you mean 'zero2'"),
        ("stage", "name a JSON file, or one of zero1, zero2"),
        ("missing/ds.json", "there is no file 'missing/ds.json'"),
        (3, "deepspeed: got 3"),
        ("{", "deepspeed: not JSON at line 1, column 2"),
        ({}, "zero_optimization is missing"),
        ({"zero_optimization": 2}, "zero_optimization is missing"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: "),
        ({"zero_optimization": {"stage": 2, "overlap": True}}, "zero_optimization.overlap: "),
        (OWN | {"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size=2"),
        (OWN | {"elasticity": {"enabled": True}}, "elasticity.enabled=True"),
    ],
)
def test_what_cant_be_used_is_refused_in_one_sentence(option, message):
    with pytest.raises(ConfigError) as caught:
        read_deepspeed(option)
    assert message in str(caught.value)
    assert str(caught.value).startswith("deepspeed: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b'{"a": ', "not JSON at line 1"), (b"[1]", "got a list"), (b"\xff\xfe", "isn't UTF-8 text")],
)
def test_a_broken_file_is_named(tmp_path, content, message):
    file = tmp_path / "own.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_deepspeed(str(file))
    assert str(file) in str(caught.value)


def test_a_folder_is_no_configuration(tmp_path):
    with pytest.raises(ConfigError, match="can't be read"):
        read_deepspeed(str(tmp_path))
