"""Reads the options that hold arguments of `from_pretrained`."""

from __future__ import annotations

import json
from typing import Any

from dpofast.errors import ConfigError
from dpofast.options.quantisation import OPTION, quantisation_options


def read_init_kwargs(name: str, given: Any) -> dict[str, Any] | None:
    """The arguments as a mapping, under their present names.

    Args:
        name: the option's name, used in messages.
        given: a mapping, or one as JSON, as command lines have it; None for no arguments.

    Raises:
        ConfigError: the value is no mapping, or its quantisation can't be used.
    """
    options = given
    if isinstance(options, str):
        try:
            options = json.loads(options)
        except ValueError as error:
            raise ConfigError(
                f"{name}: got {options!r}, expected a mapping or one as JSON."
            ) from error
    if options is None:
        return None
    if not isinstance(options, dict):
        raise ConfigError(f"{name}: got {options!r}, expected a mapping.")
    if "torch_dtype" in options:  # the old name of dtype
        options = dict(options)
        options.setdefault("dtype", options.pop("torch_dtype"))
    if options.get(OPTION) is not None:
        options = {**options, OPTION: quantisation_options(options[OPTION])}
    return options
