"""The option gradient_checkpointing, under both of its names in transformers."""

from __future__ import annotations

from typing import Any, Literal

from dpofast.errors import ConfigError

# The words are for HfArgumentParser, which takes no union of a bool and a text.
Checkpointing = Literal[True, False, "auto", "true", "false", "True", "False"]
AUTO: Literal["auto"] = "auto"
CHECKPOINTING_HELP = {
    "help": "Recompute activations in the backward: true, false or auto.",
    **{"nargs": "?", "const": True},  # for HfArgumentParser: `--NAME` means true
}
NEW_NAME = "activation_checkpointing"  # since transformers 5.23
NAMES = ("gradient_checkpointing", NEW_NAME)
_WORDS: dict[str, Checkpointing] = {"true": True, "false": False, AUTO: AUTO}
# An argument of transformers that itself says which layers are checkpointed.
EVERY = "every_n_layers"


def settle_checkpointing(config: Any) -> None:
    """Give the option its usual form, under both of its names.

    DPOConfig sets a default under the old name. transformers would warn about that name if the new
    one were empty, so the value is copied to the new one. The new name is the one that counts. But
    a config that is changed under its old name still has an auto under the new one.

    Args:
        config: a DPOConfig, before transformers reads it, or one whose options have been changed.

    Raises:
        ConfigError: the value is neither true, false nor auto.
    """
    old, new = (_usual(name, getattr(config, name, None)) for name in NAMES)
    if new is None or (new == AUTO and old is not None):
        new = old
    if hasattr(config, NEW_NAME):
        setattr(config, NEW_NAME, new)
    config.gradient_checkpointing = new
    if getattr(config, f"{NEW_NAME}_kwargs", ...) is None:
        setattr(config, f"{NEW_NAME}_kwargs", config.gradient_checkpointing_kwargs)


def _usual(name: str, value: Any) -> Checkpointing | None:
    if isinstance(value, bool) or value is None:
        return value
    word = str(value).lower()
    if word not in _WORDS:
        raise ConfigError(f"{name}: got {value!r}, expected auto, true or false.")
    return _WORDS[word]


def checkpointing_options(config: Any) -> dict[str, Any]:
    """The arguments of checkpointing: those of torch's function, every_n_layers and offload."""
    kwargs = "gradient_checkpointing_kwargs"
    given = getattr(config, kwargs.replace("gradient", "activation"), None)
    return dict(given or getattr(config, kwargs, None) or {})


def chooses_layers(config: Any) -> bool:
    """Whether the trainer chooses how many layers are checkpointed, by the memory they need."""
    value = getattr(config, NEW_NAME, None)
    value = config.gradient_checkpointing if value is None else value
    return value == AUTO and EVERY not in checkpointing_options(config)
