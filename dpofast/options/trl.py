"""Arguments of `DPOTrainer` as scripts for TRL give them, of today and of years ago."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers import TrainingArguments

from dpofast.errors import ConfigError
from dpofast.options.config import DPOConfig, option_names
from dpofast.options.foreign import refuse_unknown_options


def resolve_config(
    args: TrainingArguments | None, options: dict[str, Any], model_name: str
) -> DPOConfig:
    """One DPOConfig of `args` and the options that old scripts give the trainer itself.

    Args:
        args: ours, TRL's or a plain TrainingArguments; None for the defaults.
        options: further keyword arguments of the trainer, such as beta and max_length.
        model_name: names the output folder where `args` is None.

    Raises:
        ConfigError: an option that is unknown, or that can't be honoured.
    """
    options = refuse_unknown_options(options, option_names(), where="DPOTrainer")
    if args is None:
        return DPOConfig(**{"output_dir": f"{model_name.split('/')[-1]}-DPO", **options})
    if isinstance(args, DPOConfig) and not options:
        return args
    if not isinstance(args, TrainingArguments):
        raise ConfigError(f"args: got a {type(args).__name__}, expected a dpofast.DPOConfig.")
    given = {item.name: getattr(args, item.name) for item in fields(args) if item.init}
    return DPOConfig(**{**given, **options})


def resolve_tokenizer(processing_class: Any, options: dict[str, Any]) -> Any:
    """The tokenizer under its present name or its old one, `tokenizer`; removes that from options.

    Raises:
        ConfigError: both were given, or a processor of images.
    """
    old = options.pop("tokenizer", None)
    if old is not None and processing_class is not None:
        raise ConfigError("Give either processing_class or its old name tokenizer, not both.")
    tokenizer = old if processing_class is None else processing_class
    if tokenizer is not None and hasattr(tokenizer, "image_processor"):
        raise ConfigError(
            "processing_class: vision-language models aren't supported; pass a tokenizer."
        )
    return tokenizer


def refuse(argument: str, value: Any, remedy: str) -> None:
    """Raise ConfigError if an argument that can't be honoured was given."""
    if value is not None:
        raise ConfigError(f"DPOTrainer: {argument} isn't supported: {remedy}.")
