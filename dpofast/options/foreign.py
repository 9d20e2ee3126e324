"""Refuses options that don't exist, all at once: each with its right name, or with a remedy."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from dpofast.errors import options_error
from dpofast.options.foreign_keys import IN_PYTHON, OTHER_KEYS, OTHER_NAMES
from dpofast.options.trl_fields import RULES
from dpofast.spelling import nearest_name

# Arguments of TRL's trainer and of its scripts that aren't fields of its DPOConfig. Each has the
# values that change nothing, which are therefore accepted, and a remedy for all other values.
FOREIGN_OPTIONS: dict[str, tuple[tuple[Any, ...], str]] = {
    "model_init": ((None,), "pass the model"),
    "compute_loss_func": ((None,), "give a loss of your own as loss_fn (docs/extending.md)"),
    "optimizer_cls_and_kwargs": ((None,), "pass optimizers, or override create_optimizer"),
    "preprocess_logits_for_metrics": (
        (None,),
        "no logits exist; compute_metrics gets log-probs and rewards (docs/extending.md)",
    ),
    "streaming": ((False,), "set dataset_streaming"),
    "test_split_size": (
        (None,),
        "set eval_split, which holds out whole prompts (in Python, use dpofast.data.hold_out)",
    ),
    "ignore_bias_buffers": ((False,), "leave it out; nothing here needs it"),
    "datasets": (
        (None, []),
        "list the paths in dataset_name and the fractions in dataset_shares; dataset_config, "
        "dataset_train_split and dataset_columns are the same for all datasets (in Python, use "
        "dpofast.data.mix_preferences)",
    ),
}


def refuse_unknown_options(
    options: Mapping[str, Any], known: Collection[str], where: str = "DPOConfig"
) -> dict[str, Any]:
    """Drops foreign options whose value changes nothing, and refuses all other unknown ones.

    Args:
        options: names and values as the user gave them.
        known: names of the options that exist.
        where: class that the options are given to, used in messages.

    Returns:
        The known options.

    Raises:
        ConfigError: a foreign option has a value that isn't supported, or an option doesn't exist.
    """
    about = {
        name: about_unknown(name, value, known)
        for name, value in options.items()
        if name not in known
    }
    wrong = [f"{where}: {sentence}" for sentence in about.values() if sentence is not None]
    if wrong:
        raise options_error(wrong)
    return {name: value for name, value in options.items() if name in known}


def about_unknown(
    name: str, value: Any, known: Collection[str], likely: Sequence[str] = ()
) -> str | None:
    """Says what is wrong with an option that doesn't exist.

    Args:
        name: name that the user gave.
        value: value that the user gave; `...` if only the name counts.
        known: names of the options that exist.
        likely: known names that a misspelt one more probably means than any other.

    Returns:
        One sentence; None if the option belongs to TRL, and its value changes nothing.
    """
    if name in FOREIGN_OPTIONS:
        neutral, instead = FOREIGN_OPTIONS[name]
        if value is ...:
            return f"{name} isn't an option here: {instead}."
        return None if value in neutral else f"{name}={value!r} isn't supported: {instead}."
    remedy = _remedy(name, known)
    if remedy is not None:
        return f"{name} isn't an option here: {remedy}."
    nearest = nearest_name(name, [*likely, *hintable(known)])
    hint = f"; did you mean {nearest!r}?" if nearest else "; see docs/configuration.md."
    return f"there is no option {name!r}{hint}"


def hintable(known: Iterable[str]) -> list[str]:
    """The names that an error may suggest: not those that would be refused, or have no effect."""
    return [name for name in known if name not in RULES]


def _remedy(name: str, known: Collection[str]) -> str | None:
    """What to write for an option of another tool; None for an option of no tool."""
    ours = OTHER_NAMES.get(name, name)
    if ours in known:
        return f"write {ours}"
    if ours in IN_PYTHON:
        return IN_PYTHON[ours]
    return OTHER_KEYS.get(name)
