"""Reads options from a YAML file and from the command line, before names or types are checked."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dpofast.errors import ConfigError

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class GivenOption:
    """An option as the user gave it.

    Attributes:
        value: the value as YAML reads it.
        where: the file's name, or "command line"; used in error messages.
        line: line of the file, counted from 1; None on the command line.
    """

    value: Any
    where: str
    line: int | None = None

    @property
    def place(self) -> str:
        """The file with its line, or "command line"."""
        return self.where if self.line is None else f"{self.where}, line {self.line}"


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that is given twice; SafeLoader itself silently keeps the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, Hashable):
                continue  # the parent's construct_mapping refuses it
            if key in seen:
                raise ConfigError(f"{key!r} is given twice, in lines {seen[key]} and {line}")
            seen[key] = line
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, GivenOption]:
    """Read the options of a YAML file.

    Returns:
        Options by name.

    Raises:
        ConfigError: the file can't be read, isn't YAML, isn't a mapping, or gives a key twice.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it isn't UTF-8 text"
        raise ConfigError(f"{path}: can't be read: {reason}.") from error
    try:
        content = yaml.load(text, Loader=_UniqueKeyLoader)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; keep one of them.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        if str(getattr(error, "context", None)).startswith("while scanning"):
            # A key without a colon or an open quote, which is noticed only after its line.
            mark = getattr(error, "context_mark", None) or mark
        line = f" at line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or "it can't be parsed"
        raise ConfigError(f"{path}: not YAML{line}: {reason}.") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: got {_kind(content)}, expected options, one `name: value` in a line."
        )
    root = yaml.compose(text)
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    lines = {key.value: key.start_mark.line + 1 for key, _ in pairs}
    return {
        str(key): GivenOption(value, str(path), lines.get(str(key)))
        for key, value in content.items()
    }


def read_overrides(arguments: Sequence[str]) -> dict[str, GivenOption]:
    """Read options from the command line: `--beta 0.2`, `--beta=0.2`, `--use_peft`, `--names a b`.

    Values are read as YAML. A name without a value means true, and several values are a list. `-`
    and `_` are the same in a name.

    Args:
        arguments: the part of the command line that holds options.

    Returns:
        Options by name, with underscores.

    Raises:
        ConfigError: a word that belongs to no option, or an option given twice.
    """
    found: dict[str, list[str]] = {}
    name = None
    for argument in arguments:
        if argument.startswith("--") and len(argument) > 2:
            name, equals, value = argument[2:].partition("=")
            name = name.replace("-", "_")
            if name in found:
                raise ConfigError(f"{COMMAND_LINE}: --{name} is given twice; keep one of them.")
            found[name] = [value] if equals else []
        elif name is None:
            raise ConfigError(
                f"{COMMAND_LINE}: {argument!r} belongs to no option; the YAML file comes first, "
                "then `--name value`."
            )
        else:
            found[name].append(argument)
    return {name: GivenOption(_value(texts), COMMAND_LINE) for name, texts in found.items()}


def split_own_options(
    arguments: Sequence[str], own: Sequence[str]
) -> tuple[dict[str, GivenOption], list[str]]:
    """Separate the options that only one command has, such as `inspect --step`, from the others.

    Args:
        arguments: the part of the command line that holds options.
        own: names of the command's own options.

    Returns:
        The own options that are given, by name, and the arguments that belong to other options.

    Raises:
        ConfigError: an own option is given twice.
    """
    ours: list[str] = []
    others: list[str] = []
    current = others
    for argument in arguments:
        if argument.startswith("--"):
            name = argument[2:].partition("=")[0].replace("-", "_")
            current = ours if name in own else others
        current.append(argument)  # values follow the name that they belong to
    return read_overrides(ours), others


def _value(texts: list[str]) -> Any:
    if not texts:
        return True
    values = [_scalar(text) for text in texts]
    return values[0] if len(values) == 1 else values


def _scalar(text: str) -> Any:
    try:
        return yaml.safe_load(text) if text else text
    except yaml.YAMLError:
        return text  # some text only looks like YAML, for example a template


def _kind(content: Any) -> str:
    return "an empty file" if content is None else f"a {type(content).__name__}"
