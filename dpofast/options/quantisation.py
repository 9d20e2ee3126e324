"""How a model is quantised when it is loaded: the option `quantization_config`, as plain values."""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

import torch

from dpofast.errors import ConfigError

OPTION = "quantization_config"
QUANT_TYPES = ("nf4", "fp4")
DTYPES = ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage")


def quantisation_options(given: Any) -> dict[str, Any]:
    """Read a quantization_config into the arguments of transformers' BitsAndBytesConfig.

    Args:
        given: a BitsAndBytesConfig, or a mapping of its arguments.

    Returns:
        A new dict of JSON types, which `bitsandbytes_config` turns into a BitsAndBytesConfig.

    Raises:
        ConfigError: it is for another tool than bitsandbytes, has an unknown or unusable argument,
            or asks for neither 4 nor 8 bits; or bitsandbytes isn't installed.
    """
    is_mapping = isinstance(given, dict)
    options = dict(given) if is_mapping else _options_of(given)
    method = options.pop("quant_method", "bitsandbytes")
    if getattr(method, "value", method) != "bitsandbytes":
        raise ConfigError(
            f"{OPTION}: quant_method {getattr(method, 'value', method)!r} isn't supported; only "
            "bitsandbytes is."
        )
    options = {name: value for name, value in options.items() if not name.startswith("_")}
    for name in DTYPES:
        if options.get(name) is not None:
            options[name] = _dtype_name(name, options[name])
    config = bitsandbytes_config(options)
    if not config.load_in_4bit and not config.load_in_8bit:
        raise ConfigError(f"{OPTION}: set load_in_4bit or load_in_8bit to true, or leave it out.")
    if config.load_in_4bit and config.bnb_4bit_quant_type not in QUANT_TYPES:
        raise ConfigError(
            f"{OPTION}: bnb_4bit_quant_type: got {config.bnb_4bit_quant_type!r}, expected one of "
            f"{QUANT_TYPES}."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"{OPTION} needs bitsandbytes: pip install 'dpofast[bitsandbytes]'.")
    return options


def bitsandbytes_config(options: dict[str, Any]) -> Any:
    """Make a BitsAndBytesConfig from the result of `quantisation_options`.

    Raises:
        ConfigError: an argument is unknown or unusable.
    """
    from transformers import BitsAndBytesConfig

    known = set(inspect.signature(BitsAndBytesConfig).parameters) - {"kwargs"}
    for name in options:
        if name not in known:
            raise ConfigError(
                f"{OPTION}: there is no argument {name!r}; those of BitsAndBytesConfig are "
                f"{', '.join(sorted(known))}."
            )
    try:
        return BitsAndBytesConfig(**options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{OPTION}: {error}.") from error


def _options_of(given: Any) -> dict[str, Any]:
    """The arguments that a BitsAndBytesConfig was made with."""
    if type(given).__name__ != "BitsAndBytesConfig":
        raise ConfigError(
            f"{OPTION}: got a {type(given).__name__}, expected transformers' BitsAndBytesConfig or "
            "a mapping of its arguments; no other way of quantising is supported."
        )
    return dict(given.to_dict())


def _dtype_name(name: str, value: Any) -> str:
    text = str(value).removeprefix("torch.")
    if not isinstance(getattr(torch, text, None), torch.dtype):
        raise ConfigError(f"{OPTION}: {name}: got {value!r}, expected a dtype such as bfloat16.")
    return text
