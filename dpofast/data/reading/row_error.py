"""The error of one row, for code that sees the row but doesn't know its place in the source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class RowError(Exception):
    """A row that can't be used. The text says what is wrong and what to do, but not where.

    The loop over the rows catches it and raises a DataError that begins with the row's place.
    """


# What a user can do about a pair that only `strict` refuses.
STRICT_REMEDY = "remove the row, or leave strict off to have such pairs left out and reported"


def empty_answer(column: str) -> RowError:
    return RowError(f"{column} is an empty answer; give it a text or remove the row")


def naming(option: str, names: Mapping[str, str]) -> str:
    """An argument that maps names, and the name of the same option in YAML and on a command line.

    Args:
        option: "columns" or "roles", arguments of `load_preferences` and of the trainer.
        names: what it maps.
    """
    pairs = ", ".join(f"{shown(ours)}: {shown(theirs)}" for ours, theirs in names.items())
    return f"{option}={{{pairs}}} (as an option: dataset_{option})"


def shown(value: Any, limit: int = 60) -> str:
    """`value` as an error quotes it: its repr, cut to `limit` characters."""
    # Cutting first saves the repr of a whole long answer.
    text = repr(value[: limit + 1]) if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def text_of(value: Any, what: str) -> str:
    """Return `value` if it is text that can be stored.

    Args:
        value: anything found in a row.
        what: name of the value, used in errors.
    Raises:
        RowError: it is not a string, or holds half of a surrogate pair.
    """
    if value is None:
        raise RowError(f"{what} is null; give it a text or remove the row")
    if not isinstance(value, str):
        raise RowError(
            f"{what} is not text but {type(value).__name__} {shown(value)}; write it as a string"
        )
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RowError(
                f"{what} holds half of a surrogate pair at character {error.start}, which is no "
                "Unicode text; write the file as UTF-8 again"
            ) from None
    return value
