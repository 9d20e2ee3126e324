"""Reads the option `deepspeed`: the name of a configuration in this package, or the user's own."""

from __future__ import annotations

import copy
import json
from importlib import resources
from pathlib import Path
from typing import Any

from dpofast.errors import ConfigError
from dpofast.spelling import nearest_name

NAMES = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
BATCH_FIELDS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
# Fields that would give a rank other pairs than the ones planned for it: the value that switches
# each off, and the reason for the error message.
UNSUPPORTED = {
    ("elasticity", "enabled"): (False, "the pairs of a step would change with the ranks"),
    ("tensor_parallel", "autotp_size"): (1, "ranks share a step's pairs, not a layer"),
}


def read_deepspeed(option: Any) -> dict[str, Any]:
    """Read a DeepSpeed configuration into a new dict.

    If it leaves out fields for the batch, clipping or precision, these become "auto": transformers
    then takes them from the other options. ZeRO-3 gathers the weights when a model is saved, unless
    the configuration says otherwise.

    Args:
        option: one of NAMES, the path of a JSON file, JSON text, or a mapping.

    Raises:
        ConfigError: there is no such name or file, or it isn't a usable configuration.
    """
    where = source(option)
    # A copy, because defaults are filled in below and the user's mapping must not change.
    config = copy.deepcopy(option) if isinstance(option, dict) else _parsed(_text(option), where)
    if not isinstance(config, dict):
        raise ConfigError(f"{where}: got a {type(config).__name__}, expected a mapping.")
    return checked(config, where)


def checked(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Check a configuration, and fill in the fields that it leaves out.

    Args:
        config: DeepSpeed configuration; changed in place.
        where: name of the configuration in error messages, from `source`.

    Returns:
        The same dict.

    Raises:
        ConfigError: it has no usable zero_optimization, or asks for something unsupported.
    """
    zero = config.get("zero_optimization")
    if not isinstance(zero, dict):
        raise ConfigError(
            f'{where}: zero_optimization is missing; add "zero_optimization": {{"stage": 2}}.'
        )
    _check_zero(zero, where)
    for (section, name), (off, reason) in UNSUPPORTED.items():
        given = config.get(section)
        value = given.get(name, off) if isinstance(given, dict) else off
        if value != off:
            raise ConfigError(
                f"{where}: {section}.{name}={value!r} isn't supported, as {reason}; leave it out."
            )
    # Without a value for gradient_clipping DeepSpeed wouldn't clip at all.
    for name in (*BATCH_FIELDS, "gradient_clipping"):
        config.setdefault(name, "auto")
    for name in ("bf16", "fp16"):
        config.setdefault(name, {"enabled": "auto"})
    if zero.get("stage") == 3:
        zero.setdefault("stage3_gather_16bit_weights_on_model_save", True)
    return config


def source(option: Any) -> str:
    """Name the option and its file or configuration for messages, such as "deepspeed: ds.json"."""
    is_text = isinstance(option, (str, Path)) and not str(option).lstrip().startswith("{")
    return f"deepspeed: {option}" if is_text else "deepspeed"


def _text(option: Any) -> str:
    """Get the JSON text: the option itself, or the content of the file that it names."""
    if not isinstance(option, (str, Path)):
        raise ConfigError(
            f"deepspeed: got {option!r}, expected one of {', '.join(NAMES)}, the path of a JSON "
            "file, or a mapping."
        )
    name = str(option)
    if name.lstrip().startswith("{"):
        return name
    if name in NAMES:
        return resources.files(__package__).joinpath(f"{name}.json").read_text(encoding="utf-8")
    path = Path(name).expanduser()
    if not path.exists():
        raise ConfigError(_no_such(name))
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it isn't UTF-8 text"
        raise ConfigError(f"deepspeed: {name} can't be read: {reason}.") from error


def _no_such(name: str) -> str:
    """Write the message for a name that is neither a file nor one of NAMES."""
    known = ", ".join(NAMES)
    if Path(name).suffix or Path(name).name != name:
        return f"deepspeed: there is no file {name!r}; name a JSON file, or one of {known}."
    nearest = nearest_name(name, NAMES)
    hint = f"did you mean {nearest!r}? Else name" if nearest else "name"
    return f"deepspeed: there is no {name!r}; {hint} a JSON file, or one of {known}."


def _parsed(text: str, where: str) -> Any:
    """Parse JSON, or raise ConfigError with the place of the error."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{where}: not JSON at line {error.lineno}, column {error.colno}: {error.msg}."
        ) from error


def _check_zero(zero: dict[str, Any], where: str) -> None:
    """Let DeepSpeed check its section now, before time is spent on loading a model."""
    try:
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    except ImportError as error:
        raise ConfigError("deepspeed: needs DeepSpeed: pip install deepspeed.") from error
    try:
        DeepSpeedZeroConfig(**_without_auto(zero))
    except ValueError as error:  # pydantic's ValidationError is one
        described = getattr(error, "errors", None)
        first = described()[0] if described else {"loc": (), "msg": str(error)}
        name = ".".join(["zero_optimization", *map(str, first["loc"])])
        raise ConfigError(f"{where}: {name}: {first['msg']}.") from error


def _without_auto(section: dict[str, Any]) -> dict[str, Any]:
    """Copy a section without its "auto" values, which only transformers understands."""
    return {
        name: _without_auto(value) if isinstance(value, dict) else value
        for name, value in section.items()
        if value != "auto"
    }
