"""Reads the arguments that TRL scripts, new and old, give to `DPOTrainer`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers import TrainingArguments

from dpofast.errors import ConfigError
from dpofast.options.config import DPOConfig
from dpofast.options.foreign import refuse_unknown_options
from dpofast.options.trl_fields import RULES
from dpofast.options.unsupported import UNUSED


def resolve_config(
    args: TrainingArguments | None,
    options: dict[str, Any],
    model_name: str,
    config_class: type[DPOConfig] = DPOConfig,
    accepted: type[DPOConfig] | None = None,
) -> DPOConfig:
    """Merges `args` and the options that old scripts give to the trainer itself.

    Args:
        args: a DPOConfig, TRL's or ours, or plain TrainingArguments; None for the defaults.
        options: further keyword arguments of the trainer, such as beta and max_length.
        model_name: name of the model, which names the output folder if `args` is None.
        config_class: the trainer's class of options.
        accepted: the class of options that `args` may have; None for the same.

    Raises:
        ConfigError: an option is unknown or can't be honoured, or `args` is of another type.
    """
    if isinstance(args, DPOConfig) and not isinstance(args, accepted or config_class):
        raise ConfigError(
            f"args: got a {type(args).__name__}, expected a dpofast.{config_class.__name__}."
        )
    kind = type(args) if isinstance(args, DPOConfig) else config_class
    known = frozenset(item.name for item in fields(kind) if item.init)
    options = refuse_unknown_options(options, known, where="DPOTrainer")
    if args is None:
        method = config_class.__name__.removesuffix("Config")
        return kind(**{"output_dir": f"{model_name.split('/')[-1]}-{method}", **options})
    if not isinstance(args, TrainingArguments):
        raise ConfigError(
            f"args: got a {type(args).__name__}, expected a dpofast.{config_class.__name__}."
        )
    if isinstance(args, DPOConfig):
        # A script may have set attributes after the options were checked.
        args.check_again()
        if not options:
            return args
    return kind(**{**_given(args, known), **options})


def _given(args: TrainingArguments, known: frozenset[str]) -> dict[str, Any]:
    """The values of a config that count: ours, and those of the classes of TRL and transformers.

    TRL's config has options of its own, which DPOConfig then accepts or refuses one by one. Fields
    that a script has added to such a class are its own business, unless they are options here.
    """
    libraries = ("dpofast", "transformers", "trl")
    of_library = next(c for c in type(args).__mro__ if c.__module__.split(".")[0] in libraries)
    names = known | {item.name for item in fields(of_library)}
    if isinstance(args, DPOConfig):
        names -= RULES.keys() | UNUSED.keys()  # they have no effect, and the log has said so once
    return {
        item.name: getattr(args, item.name)
        for item in fields(args)
        if item.init and item.name in names
    }


def resolve_tokenizer(processing_class: Any, options: dict[str, Any]) -> Any:
    """The tokenizer, given under its present name or its old one, `tokenizer`.

    Args:
        processing_class: the argument with the present name.
        options: further keyword arguments of the trainer; `tokenizer` is removed from them.

    Raises:
        ConfigError: the two names differ, or the argument is a processor of images.
    """
    old = options.pop("tokenizer", None)
    if None not in (old, processing_class) and old is not processing_class:
        raise ConfigError(
            "processing_class and its old name tokenizer differ: give only one of them."
        )
    tokenizer = old if processing_class is None else processing_class
    if tokenizer is not None and hasattr(tokenizer, "image_processor"):
        raise ConfigError(
            "processing_class: vision-language models aren't supported; pass a tokenizer."
        )
    return tokenizer


def refuse(argument: str, value: Any, remedy: str) -> None:
    """Raises ConfigError if an argument that can't be honoured was given."""
    if value is not None:
        raise ConfigError(f"DPOTrainer: {argument} isn't supported: {remedy}.")
