"""Checks transformers' options whose mistakes would show only once a model is loaded."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import trainer_log_levels

from dpofast.errors import ConfigError
from dpofast.spelling import nearest_name

# Arguments of checkpointing that torch takes without naming them, or that transformers takes out.
_OTHER_CHECKPOINTING_NAMES = ("preserve_rng_state", "every_n_layers", "offload")

_LARGEST_SEED = 2**32 - 1  # NumPy takes no larger one


def check_training_fields(config: Any) -> None:
    """Check names, numbers, and options that hold others.

    Args:
        config: a DPOConfig, before or after transformers has read it.

    Raises:
        ConfigError: names the option, and the name or the number that can't be used.
    """
    if config.output_dir == "":
        raise ConfigError("output_dir: got '', expected the name of a folder.")
    if config.seed > _LARGEST_SEED:
        raise ConfigError(f"seed: got {config.seed}, expected at most {_LARGEST_SEED}.")
    for name in ("log_level", "log_level_replica"):
        if (level := getattr(config, name)) not in trainer_log_levels:
            known = ", ".join(trainer_log_levels)
            raise ConfigError(f"{name}: got {level!r}, expected one of {known}.")
    for name in ("adam_beta1", "adam_beta2"):
        _check_number(name, getattr(config, name), below=1.0)
    for name in ("adam_epsilon", "weight_decay", "dataloader_num_workers"):
        _check_number(name, getattr(config, name))
    if config.optim_args:
        _check_optim_args(config.optim_args)
    for prefix in ("gradient", "activation"):  # what the first one holds is in both
        name = f"{prefix}_checkpointing_kwargs"
        given = _mapping(name, getattr(config, name, None))
        _check_names(name, given, _checkpointing_names())
    _mapping("lr_scheduler_kwargs", config.lr_scheduler_kwargs)
    _check_accelerator_config(config.accelerator_config)


def check_precision(config: Any) -> None:
    """Refuse fp16 where accelerate would pass over it.

    Args:
        config: a DPOConfig whose device transformers has chosen.

    Raises:
        ConfigError: the device is a CPU, and DeepSpeed isn't used.
    """
    if config.fp16 and config.deepspeed is None and config.device.type == "cpu":
        raise ConfigError(
            "fp16: a CPU would compute in float32 all the same; leave it out, or set bf16: true."
        )


def _check_number(name: str, value: Any, below: float = math.inf) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and 0.0 <= value < below):
        limits = "at least 0" if below == math.inf else f"from 0 to below {below:g}"
        raise ConfigError(f"{name}: got {value!r}, expected a number {limits}.")


def _check_optim_args(given: str) -> None:
    for part in given.split(","):
        if part.count("=") != 1:
            raise ConfigError(
                f"optim_args: got {part.strip()!r}, expected `name=value`, several of them "
                "separated by commas."
            )


def _mapping(name: str, given: Any) -> dict[str, Any]:
    """The option as a mapping; command lines have it as JSON."""
    options = given
    if isinstance(given, str) and given.startswith("{"):
        try:
            options = json.loads(given)
        except ValueError as error:
            raise ConfigError(f"{name}: got {given!r}, which is broken JSON; mend it.") from error
    if options is not None and not isinstance(options, dict):
        raise ConfigError(f"{name}: got {given!r}, expected a mapping, such as {{name: value}}.")
    return options or {}


def _check_names(option: str, given: Iterable[str], known: list[str]) -> None:
    for name in given:
        if name not in known:
            nearest = nearest_name(str(name), known)
            hint = f"did you mean {nearest!r}?" if nearest else f"choose among {', '.join(known)}."
            raise ConfigError(f"{option}: there is no {name!r} in it; {hint}")


def _checkpointing_names() -> list[str]:
    parameters = inspect.signature(checkpoint).parameters.values()
    named = [each.name for each in parameters if each.default is not each.empty]
    return [*named, *_OTHER_CHECKPOINTING_NAMES]


def _check_accelerator_config(given: Any) -> None:
    name = "accelerator_config"
    if isinstance(given, AcceleratorConfig | type):  # transformers refuses the class itself
        return
    if isinstance(given, str) and not given.startswith("{"):
        try:
            given = json.loads(Path(given).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"{name}: {given!r} can't be read ({error.strerror}); give a mapping, or the path "
                "of a JSON file with one."
            ) from error
        except ValueError as error:
            raise ConfigError(f"{name}: {given!r} isn't JSON ({error}); mend it.") from error
    known = [item.name for item in fields(AcceleratorConfig)]
    _check_names(name, _mapping(name, given), known)
