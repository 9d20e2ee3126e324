"""Checks the values that people write against the types of the options."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from enum import EnumType
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from dpofast.cli.given import COMMAND_LINE
from dpofast.errors import ConfigError

_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
    Path: "a path",
    type(None): "null",
}


def checked_value(name: str, value: Any, annotation: Any, where: str) -> Any:
    """Convert a value to its option's type, for example the text "1e-6" to the number 1e-6.

    Args:
        name: option name, used in error messages.
        value: value as YAML reads it.
        annotation: type of the option.
        where: the file's name, or "command line"; used in error messages.

    Returns:
        The value in the option's type.

    Raises:
        ConfigError: the value isn't of that type.
    """
    if value is False and name.endswith("_strategy"):
        return "no"  # YAML reads the bare word no as False
    accepted = _members(annotation)
    literals = {each for part in accepted if get_origin(part) is Literal for each in get_args(part)}
    if isinstance(value, bool) and not {bool, Any} & {*accepted, *map(type, literals)}:
        raise ConfigError(_message(name, value, accepted, where))  # Python would take True for 1
    only_list = str not in accepted and any(get_origin(member) is list for member in accepted)
    if only_list and where == COMMAND_LINE and isinstance(value, int | float | str):
        value = [value]  # `--name a b` is a list, so `--name a` is one, too
    enums = tuple(member for member in accepted if isinstance(member, EnumType))
    if enums and isinstance(value, str):
        accepted, annotation = enums, enums[0]  # text must be the value of an enum's member
    try:
        config = ConfigDict(coerce_numbers_to_str=True, arbitrary_types_allowed=True)
        adapter: TypeAdapter[Any] = TypeAdapter(annotation, config=config)
    except PydanticUserError:  # the type has a configuration of its own and accepts no other
        adapter = TypeAdapter(annotation)
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise ConfigError(_message(name, value, accepted, where)) from error


def _members(annotation: Any) -> tuple[Any, ...]:
    """The types in a union, or the type itself."""
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(member for part in get_args(annotation) for member in _members(part))
    return (annotation,)


def _message(name: str, value: Any, accepted: tuple[Any, ...], where: str) -> str:
    expected = list(dict.fromkeys(_type_name(member) for member in accepted))
    return f"{where}: {name}: got {value!r}, expected {' or '.join(expected)}."


def _words(values: Iterable[Any]) -> list[str]:
    """Each of some values as YAML writes it; text that says a bool again is left out."""
    bools = {str(value): str(value).lower() for value in values if isinstance(value, bool)}
    return list(dict.fromkeys(bools.get(str(value), str(value)) for value in values))


def _type_name(annotation: Any) -> str:
    """The name of a type in an error message."""
    origin = get_origin(annotation) or annotation
    if origin is Literal:
        return "one of " + ", ".join(_words(get_args(annotation)))
    if isinstance(origin, EnumType):
        members: Iterable[Any] = origin
        return "one of " + ", ".join(str(member.value) for member in members)
    if origin is list and get_args(annotation):
        return f"a list of {_type_name(get_args(annotation)[0]).removeprefix('a ')}s"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _NAMES[dict]
    return _NAMES.get(origin, getattr(origin, "__name__", str(origin)))
