"""Option values as people write them, checked against the options' types."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from enum import EnumType
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

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
    """The value as the option's type has it: "1e-6" becomes 1e-6.

    Args:
        name: of the option.
        value: as YAML gives it.
        annotation: the option's type.
        where: file, or command line; named in the error.

    Raises:
        ConfigError: it isn't of that type.
    """
    if value is False and name.endswith("_strategy"):
        return "no"  # what a YAML file says with the bare word no
    accepted = _members(annotation)
    if isinstance(value, bool) and not {bool, Any} & set(accepted):
        raise ConfigError(_message(name, value, accepted, where))  # not 1, whatever Python says
    enums = tuple(member for member in accepted if isinstance(member, EnumType))
    if enums and isinstance(value, str):
        accepted, annotation = enums, enums[0]  # text stands for one of its members
    try:
        config = ConfigDict(coerce_numbers_to_str=True, arbitrary_types_allowed=True)
        adapter: TypeAdapter[Any] = TypeAdapter(annotation, config=config)
    except PydanticUserError:  # a type with a configuration of its own
        adapter = TypeAdapter(annotation)
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise ConfigError(_message(name, value, accepted, where)) from error


def _members(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(member for part in get_args(annotation) for member in _members(part))
    return (annotation,)


def _message(name: str, value: Any, accepted: tuple[Any, ...], where: str) -> str:
    words = list(dict.fromkeys(_words(member) for member in accepted))
    return f"{where}: {name}: got {value!r}, expected {' or '.join(words)}."


def _words(annotation: Any) -> str:
    origin = get_origin(annotation) or annotation
    if origin is Literal:
        return "one of " + ", ".join(map(str, get_args(annotation)))
    if isinstance(origin, EnumType):
        members: Iterable[Any] = origin
        return "one of " + ", ".join(str(member.value) for member in members)
    if origin is list and get_args(annotation):
        return f"a list of {_words(get_args(annotation)[0]).removeprefix('a ')}s"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _NAMES[dict]
    return _NAMES.get(origin, getattr(origin, "__name__", str(origin)))
