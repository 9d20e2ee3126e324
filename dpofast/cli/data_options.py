"""Checks the options that name, mix and split a run's data, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dpofast.cli.given import GivenOption
from dpofast.cli.script_options import ScriptOptions
from dpofast.errors import ConfigError


def check_data_options(script: ScriptOptions, given: Mapping[str, GivenOption]) -> None:
    """Refuse names, shares and splits that can't be used, or that contradict each other.

    Args:
        script: the options of the script.
        given: the options as they were given, by name.

    Raises:
        ConfigError: names the option, and the file or the command line that it is given in.
    """
    _check_streaming(script, given)
    checks = {
        "dataset_name": _check_names,
        "dataset_shares": _check_shares,
        "dataset_weights": _check_weights,
        "eval_split": _check_split,
    }
    for name, check in checks.items():
        if getattr(script, name) is None:
            continue
        try:
            check(script)
        except ConfigError as error:
            raise ConfigError(f"{given[name].where}: {name}: {error}") from None


def _check_streaming(script: ScriptOptions, given: Mapping[str, GivenOption]) -> None:
    """Refuse options that need all pairs of a dataset at once."""
    if not script.dataset_streaming:
        return
    problems = {
        "eval_split": "can't hold pairs out of a stream; set eval_dataset_name or "
        "dataset_test_split",
        "dataset_shares": "can't be taken of streams; leave it out",
        "dataset_weights": "weighs several datasets, and a stream is a single one; leave it out",
    }
    for name, problem in problems.items():
        if getattr(script, name) is not None:
            raise ConfigError(
                f"{given[name].where}: {name} {problem}, or dataset_streaming: false."
            )
    if len(script.dataset_names) > 1:
        raise ConfigError(
            f"{given['dataset_name'].where}: dataset_streaming reads one dataset, and dataset_name "
            f"names {len(script.dataset_names)}; join their files, or give the trainer the result "
            "of datasets.interleave_datasets in Python."
        )


def _check_names(script: ScriptOptions) -> None:
    names = script.dataset_names
    if not names or not all(name.strip() for name in names):
        raise ConfigError(f"got {script.dataset_name!r}, expected a name, or a list of names.")
    seen: dict[str, str] = {}
    for name in names:
        place = _place(name)
        if place in seen:
            raise ConfigError(
                f"{seen[place]!r} and {name!r} are the same dataset; name it once, since no pair "
                "is repeated."
            )
        seen[place] = name


def _place(name: str) -> str:
    """The name of a dataset; the whole path of a file or a folder, however it is spelt."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def _check_shares(script: ScriptOptions) -> None:
    from dpofast.data import check_shares

    check_shares(_by_name(script, script.dataset_shares, "share"), script.dataset_names)


def _check_weights(script: ScriptOptions) -> None:
    from dpofast.data import check_weights

    check_weights(_by_name(script, script.dataset_weights, "weight"), script.dataset_names)


def _by_name(script: ScriptOptions, given: list[float] | None, what: str) -> dict[str, float]:
    """The number of each dataset by its name."""
    names, numbers = script.dataset_names, given or []
    if len(numbers) != len(names):
        raise ConfigError(
            f"got {len(numbers)} for {len(names)} datasets; give one {what} for each name in "
            "dataset_name, in the same order."
        )
    return dict(zip(names, numbers, strict=True))


def _check_split(script: ScriptOptions) -> None:
    from dpofast.data import check_eval_split

    check_eval_split(script.eval_split)
    for name in ("eval_dataset_name", "dataset_test_split"):
        if getattr(script, name) is not None:
            raise ConfigError(
                f"{name} names held-out pairs, too; keep one of them. On the command line, "
                f"`--eval_split null` or `--{name} null` undoes what a file says."
            )
    if not script.dataset_names:
        raise ConfigError("there is no dataset_name to hold pairs out of; give it, too.")
