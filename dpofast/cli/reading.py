"""Reads options from a YAML file and from the command line; nothing heavy is loaded here."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dpofast.errors import ConfigError

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Given:
    """An option's value and where it stands, for messages."""

    value: Any
    where: str


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where YAML's own silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if isinstance(key, Hashable) and key in seen:
                raise ConfigError(f"{key!r} is given twice, in lines {seen[key]} and {line}")
            seen[key] = line
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Given]:
    """The options of a YAML file.

    Raises:
        ConfigError: no such file, no YAML, no mapping, or a key given twice.
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
        line = f" at line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or "it can't be parsed"
        raise ConfigError(f"{path}: not YAML{line}: {reason}.") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: got {_kind(content)}, expected options, one `name: value` in a line."
        )
    return {str(key): Given(value, str(path)) for key, value in content.items()}


def read_overrides(arguments: Sequence[str]) -> dict[str, Given]:
    """Options of the command line: `--beta 0.2`, `--beta=0.2`, `--use_peft`, `--names a b`.

    Values are read as YAML. A name alone means true, several values are a list; `-` and `_` are
    the same within a name.

    Raises:
        ConfigError: a word that belongs to no option, or an option given twice.
    """
    found: dict[str, list[str]] = {}
    name = None
    for word in arguments:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            if name in found:
                raise ConfigError(f"{COMMAND_LINE}: --{name} is given twice; keep one of them.")
            found[name] = [value] if equals else []
        elif name is None:
            raise ConfigError(
                f"{COMMAND_LINE}: {word!r} belongs to no option; the YAML file comes first, then "
                "`--name value`."
            )
        else:
            found[name].append(word)
    return {name: Given(_value(name, words), COMMAND_LINE) for name, words in found.items()}


def split_own(arguments: Sequence[str], own: Sequence[str]) -> tuple[dict[str, Given], list[str]]:
    """What of the command line is a command's own options, and the other words."""
    ours: list[str] = []
    others: list[str] = []
    words = others
    for word in arguments:
        if word.startswith("--"):
            words = ours if word[2:].partition("=")[0].replace("-", "_") in own else others
        words.append(word)
    return read_overrides(ours), others


def _value(name: str, words: list[str]) -> Any:
    if not words:
        return True
    values = [_scalar(name, word) for word in words]
    return values[0] if len(values) == 1 else values


def _scalar(name: str, word: str) -> Any:
    try:
        return yaml.safe_load(word) if word else word
    except yaml.YAMLError:
        return word  # text that looks like YAML and is none, such as a template


def _kind(content: Any) -> str:
    return "an empty file" if content is None else f"a {type(content).__name__}"
