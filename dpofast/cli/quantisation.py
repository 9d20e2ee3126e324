"""The options that quantise a model as it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpofast.cli.given import GivenOption
from dpofast.cli.script_options import ScriptOptions
from dpofast.errors import ConfigError

FOUR_BIT_OPTIONS = (
    "bnb_4bit_quant_type",
    "bnb_4bit_compute_dtype",
    "use_bnb_nested_quant",
    "bnb_4bit_quant_storage",
)


def quantization_config(
    script: ScriptOptions, given: Mapping[str, GivenOption]
) -> dict[str, Any] | None:
    """Make the `quantization_config` of from_pretrained; None if the model isn't quantised.

    Raises:
        ConfigError: both 4 and 8 bits are asked for, or an option would have no effect.
    """
    if script.load_in_4bit and script.load_in_8bit:
        raise ConfigError(
            f"{given['load_in_8bit'].where}: load_in_4bit and load_in_8bit are both set; keep one."
        )
    for name in FOUR_BIT_OPTIONS:
        if name in given and not script.load_in_4bit:
            raise ConfigError(
                f"{given[name].where}: {name} has no effect without load_in_4bit: true; add that, "
                f"or leave {name} out."
            )
    if script.load_in_8bit:
        return {"load_in_8bit": True}
    if not script.load_in_4bit:
        return None
    computed_in = script.bnb_4bit_compute_dtype
    if computed_in is None and script.dtype != "auto":
        computed_in = script.dtype
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": script.bnb_4bit_quant_type,
        "bnb_4bit_use_double_quant": script.use_bnb_nested_quant,
        "bnb_4bit_compute_dtype": computed_in,
        "bnb_4bit_quant_storage": script.bnb_4bit_quant_storage,
    }
