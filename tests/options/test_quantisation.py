from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from transformers import BitsAndBytesConfig, QuantoConfig

from dpofast.errors import ConfigError
from dpofast.options.quantisation import bitsandbytes_config, quantisation_options


@pytest.fixture(autouse=True)
def _bitsandbytes(monkeypatch):
    """Whether or not it is installed: nothing is loaded here."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


def test_a_config_becomes_json_types_and_the_same_config_again():
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_quant_storage="float16"
    )
    options = json.loads(json.dumps(quantisation_options(config)))
    assert options["bnb_4bit_compute_dtype"] == "bfloat16"
    assert bitsandbytes_config(options).to_dict() == config.to_dict()
    assert quantisation_options(options) == options


def test_a_mapping_may_have_dtypes_in_any_form():
    for dtype in ("bfloat16", "torch.bfloat16", torch.bfloat16):
        given = {"load_in_4bit": True, "bnb_4bit_compute_dtype": dtype}
        assert quantisation_options(given)["bnb_4bit_compute_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"load_in_4bit": True, "bits": 4}, "no argument 'bits'; those of BitsAndBytesConfig"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "only one can be used"),
        ({"bnb_4bit_quant_type": "nf4"}, "set load_in_4bit or load_in_8bit to true"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"}, "got 'nf5', expected one of"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "half!"}, "got 'half!', expected a dty"),
        ({"load_in_8bit": "yes"}, "load_in_8bit must be a boolean"),
        ({"quant_method": "gptq", "bits": 4}, "quant_method 'gptq' isn't supported"),
        (QuantoConfig(), "got a QuantoConfig, expected transformers' BitsAndBytesConfig"),
        ("nf4", "got a str, expected"),
    ],
)
def test_what_cannot_be_used_is_refused(given, message):
    with pytest.raises(ConfigError, match=f"^quantization_config: .*{message}"):
        quantisation_options(given)


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'dpofast\[bitsandbytes\]'"):
        quantisation_options({"load_in_4bit": True})
