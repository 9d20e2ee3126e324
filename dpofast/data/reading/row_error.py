"""How the readers tell what is wrong with a row before they know where the row stands."""

from __future__ import annotations

from typing import Any


class RowError(Exception):
    """A row that can't be used: what is wrong and what to do, without file and row.

    The loop over the rows catches it and raises DataError with the place before the text.
    """


def shown(value: Any, limit: int = 60) -> str:
    """`value` as an error quotes it: its repr, cut to `limit` characters."""
    # A repr of a whole answer would be built only to be cut.
    text = repr(value[: limit + 1]) if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def text_of(value: Any, what: str) -> str:
    """`value` itself, checked to be text that can be stored.

    Raises:
        RowError: not a string, or half of a surrogate pair in it.
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
