"""Finds messages that a file holds as JSON text, as CSV files and many hub datasets do."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from dpofast.data.reading.messages import CALLS, is_messages
from dpofast.data.reading.row_error import RowError, shown

# Messages as `str` or NumPy prints them, which is no JSON.
_PYTHON_MESSAGES = re.compile(
    r"\s*[\[(]\s*\{\s*'(?:role|from|content|value)'\s*:.*\}\s*,?\s*[\])]\s*", re.DOTALL
)
_PYTHON_MESSAGE = re.compile(r"\s*\{\s*'(?:role|from|content|value)'\s*:.*\}\s*", re.DOTALL)


def parse_messages(value: Any, *, single: bool = False) -> Any:
    """The messages that `value` holds as JSON text; any other value comes back unchanged.

    Args:
        value: a text that is, as a whole, a JSON list of messages; or a list of JSON texts, one per
            message, as the normal form has.
        single: also take the text of a JSON object for one message.
    """
    if isinstance(value, list | tuple) and value and all(isinstance(item, str) for item in value):
        found = [_parse(item, "{") for item in value]
        return found if all(map(_is_message, found)) else value
    if isinstance(value, str):
        parsed = _parse(value, "[{" if single else "[")
        messages = [parsed] if isinstance(parsed, Mapping) else parsed
        if isinstance(messages, list) and messages and all(map(_is_message, messages)):
            return parsed
    return value


def parse_answers(
    chosen: Any, rejected: Any, *, names: tuple[str, str], single: bool
) -> tuple[Any, Any]:
    """Two answers with messages from JSON text, if both answers are messages.

    An answer can be a text that only looks like messages, for instance if the question asks for
    JSON. So a text is messages only if the other answer is messages, too, or is blank.

    Args:
        chosen, rejected: the answers as the row has them.
        names: names of the two, used in errors.
        single: also take the text of a JSON object for one message.
    Raises:
        RowError: both answers are messages, but one of them is written as Python prints it.
    """
    given = (chosen, rejected)
    found = [parse_messages(value, single=single) for value in given]
    printed = [_is_python(value, single) for value in found]
    if any(printed) or any(map(is_messages, found)):
        found = [[] if _is_blank(value) else value for value in found]
    spoken = [is_messages(value) or value == [] for value in found]
    if not all(is_one or python for is_one, python in zip(spoken, printed, strict=True)):
        # A list of JSON texts can't be a text, so it is messages whatever the other answer is.
        first, second = (v if isinstance(v, str) else f for v, f in zip(given, found, strict=True))
        return first, second
    for value, name, python in zip(found, names, printed, strict=True):
        if python:
            raise python_messages(name, value)
    return found[0], found[1]


def refuse_python_messages(value: Any, what: str) -> None:
    """Refuse a text that is a list of messages as Python prints it.

    Args:
        value: anything found in a row.
        what: name of the value, used in errors.
    Raises:
        RowError: it is such a text.
    """
    if _is_python(value, single=False):
        raise python_messages(what, value)


def python_messages(what: str, value: Any) -> RowError:
    return RowError(
        f"{what} is messages as Python prints them, not JSON: {shown(value)}; "
        "write it with json.dumps"
    )


def _is_python(value: Any, single: bool) -> bool:
    if not isinstance(value, str):
        return False
    forms = (_PYTHON_MESSAGES, _PYTHON_MESSAGE) if single else (_PYTHON_MESSAGES,)
    return any(form.fullmatch(value) for form in forms)


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def _parse(text: str, starts: str) -> Any:
    """The JSON value in a text that begins with one of the characters `starts`, otherwise None."""
    begin = text.lstrip()[:1]
    if not begin or begin not in starts:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_message(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    if "role" in value:
        return any(key in value for key in ("content", *CALLS))
    return "from" in value and "value" in value
