"""Checks `columns` and `roles`, which say what the names in a source mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpofast.data.reading.formats import COLUMNS
from dpofast.data.reading.messages import ROLES
from dpofast.errors import ConfigError
from dpofast.spelling import nearest_name

_KNOWN_ROLES = tuple(dict.fromkeys(ROLES.values()))


def check_columns(columns: Any) -> dict[str, str]:
    """A copy of `columns`: column name here -> column name in the source.

    Raises:
        ConfigError: it isn't a mapping of names, or names a column that no format has.
    """
    checked = _mapping_of_names("columns", columns, {"prompt": "question"})
    for ours, theirs in checked.items():
        if ours in COLUMNS:
            continue
        if theirs in COLUMNS:
            raise ConfigError(
                f"columns maps {ours!r} to {theirs!r}; write it the other way round: "
                f"{{{theirs!r}: {ours!r}}}"
            )
        near = nearest_name(ours, COLUMNS)
        hint = f"did you mean {near!r}?" if near else f"known are {', '.join(COLUMNS)}"
        raise ConfigError(f"columns names {ours!r}, which no format has; {hint}")
    return checked


def check_roles(roles: Any) -> dict[str, str]:
    """A copy of `roles`: role in the source -> role that the chat template knows.

    Raises:
        ConfigError: it isn't a mapping of names, or gives a misspelt role.
    """
    checked = _mapping_of_names("roles", roles, {"human": "user"})
    for theirs, role in checked.items():
        near = None if role in _KNOWN_ROLES else nearest_name(role, _KNOWN_ROLES)
        if near is not None:
            raise ConfigError(
                f"roles maps {theirs!r} to {role!r}, which no chat template knows; did you mean "
                f"{near!r}?"
            )
    return checked


def _mapping_of_names(argument: str, given: Any, example: dict[str, str]) -> dict[str, str]:
    if given is None:
        return {}
    is_mapping = isinstance(given, Mapping)
    if is_mapping and all(isinstance(text, str) for item in given.items() for text in item):
        return dict(given)
    raise ConfigError(f"{argument}: got {given!r}, expected a mapping of names, such as {example}.")
