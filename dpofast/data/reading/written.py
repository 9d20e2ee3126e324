"""Recognises texts that were messages or blocks before they were written as JSON, or printed.

Most texts are just texts, so nothing is parsed unless the first characters ask for it.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Fields with which a message says something even if its content is null or empty.
CALLS = ("tool_calls", "function_call")
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "refusal")

_BEGINNINGS = ("[", "{", "(", '"[', '"{', "array(")
# What a broken list of messages, or a broken message, still begins with, however often it was
# written as JSON.
_LIKE_MESSAGES = re.compile(
    r"""[\s"]*(?:array\()?\s*(?:\{\s*\\*["'](?:messages|conversations)\\*["']\s*:\s*)?"""
    r"""(?:[\[(]\s*\{\s*\\*["'](?:role|from|content)|\{\s*\\*["'](?:role|from))\\*["']\s*:"""
)
# Python's quotes around a key of messages or blocks, or around the JSON of a message.
_PRINTED = re.compile(r"'(?:role|from|type|messages|conversations)'\s*:|[\[(]\s*'\s*\{")
_BETWEEN_OBJECTS = re.compile(r"\}\s+\{")
_DTYPE = re.compile(r",\s*dtype=\w+\s*\)")
_WRAPPERS = ("messages", "conversations")  # objects with one of these keys hold messages
_BLOCK_TYPES = ("text", "image", "image_url", "input_text", "output_text", "audio", "video")


@dataclass(frozen=True, slots=True)
class Written:
    """What a value was before it was written as text.

    Attributes:
        kind: "text": it never was anything else; "json" or "python": a value that was written by
            JSON or printed by Python; "broken": it begins as messages do, but can't be read.
            `messages_in` also has "messages", which is no text; "hollow", messages as JSON without
            any content; and "empty", which says nothing.
        value: the value, for all kinds but "text" and "broken".
    """

    kind: str
    value: Any = None


_TEXT, _BROKEN = Written("text"), Written("broken")


def decode(text: str) -> Written:
    """The value that was written as `text`, if it was a list or an object."""
    if not text.lstrip()[:6].startswith(_BEGINNINGS):
        return _TEXT
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        # Text may well begin with JSON and go on with a question about it.
        goes_on = isinstance(error, json.JSONDecodeError) and error.msg.startswith("Extra data")
        return _json_lines(text) if goes_on else _printed(text)
    return decode(value) if isinstance(value, str) else Written("json", value)


def messages_in(value: Any) -> Written:
    """The messages that a value of a row is, or that it holds as text."""
    if isinstance(value, str):
        if value.strip() in ("", "[]", "{}", "null"):
            return Written("empty", [])
        found = decode(value)
        if found.kind not in ("json", "python"):
            return found
        messages = _messages(found.value)
        if messages is not None:
            return Written(found.kind, messages)
        if _is_request(found.value):
            return _BROKEN
        return Written("hollow", found.value) if _is_hollow(found.value) else _TEXT
    if _is_nothing(value):
        return Written("empty", [])
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        messages = _messages(value)  # one JSON text per message, as the normal form has them
        return _TEXT if messages is None else Written("messages", messages)
    return Written("messages", value) if is_messages(value) else _TEXT


def is_messages(value: Any) -> bool:
    """Whether `value` looks like messages: an object, or a list that contains an object."""
    if isinstance(value, Mapping):
        return True
    return isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value)


def holds_blocks(text: str) -> bool:
    """Whether a text is a list of blocks that was written as JSON or printed, or a printed block.

    The JSON of one object is more likely an answer in JSON.
    """
    found = decode(text)
    value = (
        [found.value] if found.kind == "python" and isinstance(found.value, dict) else found.value
    )
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(b, Mapping) and b.get("type") in _BLOCK_TYPES for b in value)
    )


def _json_lines(text: str) -> Written:
    """Messages of which each is the JSON on a line of its own."""
    try:
        values = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError):
        return _TEXT
    return Written("json", values)


def _printed(text: str) -> Written:
    """A value that Python or NumPy has printed."""
    if _PRINTED.search(text):
        # NumPy writes no commas between objects, and array(..., dtype=object) around a list. A
        # text inside the value may change as well, but the value is only looked at.
        source = _BETWEEN_OBJECTS.sub("}, {", _DTYPE.sub(")", text.replace("array(", "(")))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about escapes that a printed text never has
                return Written("python", ast.literal_eval(source.strip()))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            pass
    return _BROKEN if _LIKE_MESSAGES.match(text) else _TEXT


def _messages(value: Any) -> Any:
    """The messages in a decoded value; None if it is something else."""
    if isinstance(value, Mapping):
        filled = [name for name, field in value.items() if field]
        if len(filled) == 1 and filled[0] in _WRAPPERS:
            return _messages(value[filled[0]])
        return value if _is_message(value) else None
    if not isinstance(value, list | tuple) or not value:
        return None
    if all(isinstance(item, str) for item in value):
        found = [_first_object(item) for item in value]
        return found if all(map(_is_message, found)) else None
    return list(value) if any(map(_is_message, value)) else None


def _is_request(value: Any) -> bool:
    """Whether an object has messages and other fields, as a request to a server has."""
    return isinstance(value, Mapping) and any(
        isinstance(value.get(name), list) and _messages(value[name]) is not None
        for name in _WRAPPERS
    )


def _first_object(text: str) -> Any:
    # NumPy prints a list of texts without commas, and Python then joins them.
    if not text.lstrip().startswith("{"):
        return None
    try:
        return json.JSONDecoder().raw_decode(text.lstrip())[0]
    except (ValueError, RecursionError):
        return None


def _is_message(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    if "role" in value:
        return any(key in value for key in ("content", *CALLS, *THOUGHTS))
    return "from" in value and "value" in value


def _is_hollow(value: Any) -> bool:
    items = [value] if isinstance(value, Mapping) else value
    return (
        isinstance(items, list)
        and bool(items)
        and all(isinstance(i, Mapping) and ("role" in i or "from" in i) for i in items)
    )


def _is_nothing(value: Any) -> bool:
    """Whether a value that is no text says nothing: null, {}, [], or a list of only these."""
    if isinstance(value, list | tuple):
        return all(item is None or item == {} for item in value)
    return value is None or value == {}
