"""Finds messages that a file holds as JSON text, as CSV files and many hub datasets do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpofast.data.reading.messages import ROLES, speaker
from dpofast.data.reading.row_error import RowError, shown
from dpofast.data.reading.written import Written, decode, is_messages, messages_in

# How a row gives its prompt: as messages, as their JSON, as text, or at the beginning of answers.
MESSAGES, JSON, TEXT, IMPLICIT = "messages", "JSON", "text", "implicit"


def parse_messages(value: Any, what: str) -> Any:
    """The messages that `value` holds as JSON text; any other value comes back unchanged.

    Args:
        value: a text that is, as a whole, the JSON of messages or of one message; or a list of JSON
            texts, one per message, as the normal form has.
        what: name of the value, used in errors.
    Raises:
        RowError: it is messages as Python prints them, or broken JSON of messages.
    """
    found = messages_in(value)
    if found.kind in ("python", "broken"):
        raise _unreadable(found, what, value)
    hollow = found.kind == "hollow" and speakers(found.value) <= set(ROLES.values())
    return found.value if found.kind in ("json", "messages") or hollow else value


def refuse_messages(text: str, what: str) -> None:
    """Refuse a text that is messages, in a place where there can only be the text of one.

    Raises:
        RowError: it is JSON of messages, or messages as Python prints them.
    """
    found = messages_in(text)
    if found.kind == "json":
        raise RowError(
            f"{what} is messages as JSON: {shown(text)}; write its text, or give the messages in a "
            "column prompt"
        )
    if found.kind in ("python", "broken"):
        raise _unreadable(found, what, text)


def parse_answers(given: Sequence[Any], *, names: Sequence[str], prompt: str) -> list[Any]:
    """The answers of a row with messages from JSON text.

    An answer can be a text that only looks like messages, for instance if the question asks for
    JSON. So a text is messages only if the other answer is messages, too, or says nothing, or isn't
    there; or if the prompt is messages and the text is an answer to it.

    Args:
        given: the answers as the row has them.
        names: their names, used in errors.
        prompt: how the row gives its prompt: MESSAGES, JSON, TEXT or IMPLICIT.
    Returns:
        The answers: messages or texts. One that says nothing is [] beside messages, otherwise "".
    Raises:
        RowError: an answer is messages, but they are broken or written as Python prints them.
    """
    found = [_demoted(messages_in(value), prompt) for value in given]
    if not _are_messages(found, prompt):
        return [_text(each, value) for each, value in zip(found, given, strict=True)]
    # An answer that is real messages says nothing about how the other one is written.
    real = any(each.kind == "messages" for each in found)
    return [
        _answer(each, value, name, real)
        for each, value, name in zip(found, given, names, strict=True)
    ]


def parse_several(chosen: Any, rejected: Any, what: str) -> tuple[Any, Any]:
    """Several rejected answers from JSON text, beside a chosen one that is messages.

    Returns:
        The chosen answer, whose messages are parsed as well if there are several rejected ones, and
        the rejected ones.
    Raises:
        RowError: the rejected answers are written as Python prints them.
    """
    if not isinstance(rejected, str):
        return chosen, rejected
    several = decode(rejected)
    answers = several.value if isinstance(several.value, list) else []
    if not answers or not all(isinstance(item, str | list) for item in answers):
        return chosen, rejected
    beside = messages_in(chosen)
    if beside.kind not in ("json", "messages") or messages_in(rejected).kind != "text":
        return chosen, rejected  # one answer
    if several.kind == "python":
        raise _unreadable(several, what, rejected)
    return beside.value, several.value


def _demoted(found: Written, prompt: str) -> Written:
    """One object beside a text prompt is a message only if the assistant says it."""
    one = found.kind in ("json", "python") and isinstance(found.value, Mapping)
    if one and prompt == TEXT and speakers(found.value) != {"assistant"}:
        return Written("text")
    return found


def _are_messages(found: list[Written], prompt: str) -> bool:
    spoken = [each.kind in ("json", "python", "messages") for each in found]
    if any(_is_certain(each, prompt) for each in found):
        return True
    return any(spoken) and all(each.kind != "text" for each in found)


def _is_certain(found: Written, prompt: str) -> bool:
    """Whether an answer is messages, whatever the other one is."""
    if found.kind == "messages":
        return True
    if found.kind == "broken":
        return prompt in (JSON, IMPLICIT)
    if found.kind not in ("json", "python") or prompt == TEXT:
        return False
    if prompt == IMPLICIT:
        return True
    if prompt == JSON:
        last = found.value[-1] if isinstance(found.value, list) else found.value
        return speakers([last]) == {"assistant"}
    return speakers(found.value) <= {"assistant", "tool"}


def _answer(found: Written, value: Any, name: str, real: bool) -> Any:
    """An answer of a row whose answers are messages."""
    if found.kind in ("python", "broken"):
        raise _unreadable(found, name, value)
    if found.kind in ("json", "messages"):
        return found.value
    if not isinstance(value, str) or not value.strip():
        return [] if found.kind == "empty" else value
    if real:
        return value
    if found.kind in ("empty", "hollow"):
        return []
    if value.lstrip().startswith("[{"):  # cut off within the name of a key
        raise _unreadable(Written("broken"), name, value)
    return value


def _text(found: Written, value: Any) -> Any:
    return "" if found.kind == "empty" and not isinstance(value, str) else value


def speakers(messages: Any) -> set[str]:
    """Who speaks in decoded messages; what isn't a message counts as nobody."""
    names = set()
    for message in [messages] if isinstance(messages, Mapping) else messages:
        is_one = isinstance(message, Mapping) and is_messages(message)  # a list can be messages
        role = message.get("role") or message.get("from") if is_one else None
        names.add(speaker({"role": str(role or "")}))
    return names


def _unreadable(found: Written, what: str, value: Any) -> RowError:
    if found.kind == "broken":
        return RowError(
            f"{what} looks like messages as JSON, but is broken or has something else in it: "
            f"{shown(value)}; write only the list of messages, with json.dumps"
        )
    return RowError(
        f"{what} is messages as Python prints them, not JSON: {shown(value)}; "
        "write it with json.dumps"
    )
