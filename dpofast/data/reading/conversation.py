"""Finds the prompt of a pair of messages, wherever the row has it: apart, repeated or quoted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpofast.data.reading.implicit import split_messages
from dpofast.data.reading.json_text import refuse_messages
from dpofast.data.reading.messages import (
    CALLS,
    ROLES,
    Message,
    as_json,
    check_contents,
    content_text,
    is_empty_answer,
    read_answer,
    same,
    speaker,
)
from dpofast.data.reading.options import WEIGHT_FIELDS, refuse_weights
from dpofast.data.reading.pair import Pair, Row
from dpofast.data.reading.row_error import RowError, naming, shown, text_of

_ASKS = ("user", "system")  # speakers whose messages are never scored


def read_conversation(
    row: Row,
    prompt: list[Message] | str | None,
    what: str,
    columns: str,
    roles: Mapping[str, str],
    used: frozenset[str],
) -> Pair:
    """The pair of a row whose answers are messages.

    Args:
        row: the row.
        prompt: messages that the row gives as the prompt, or the text of one from the user; None if
            both answers begin with it.
        what: name of the column that `prompt` is from, used in errors.
        columns: names of the columns of the form.
        roles: role in the source -> role that templates know.
        used: columns of the source that the prompt was made from.
    Raises:
        RowError: the messages are no pair, or a part of the prompt has no place in it.
    """
    chosen, rejected = (
        _read_answer(row.get(c), row.name(c), roles) for c in ("chosen", "rejected")
    )
    if isinstance(prompt, list):
        check_contents(prompt, what)
    written = (chosen, rejected)
    if chosen and rejected:
        prompt, chosen, rejected = _divide(prompt, chosen, rejected, what)
    elif not isinstance(prompt, list):
        prompt = []  # the empty answer has the pair left out
    if not (is_empty_answer(chosen) or is_empty_answer(rejected)):
        for messages, column in zip(written, ("chosen", "rejected"), strict=True):
            check_contents(messages, row.name(column))
    prompt = with_system(row.get("system"), prompt)
    refuse_weights(chosen, row.name("chosen"))
    refuse_weights(rejected, row.name("rejected"))
    values = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return Pair("messages", columns, values, used | row.used("chosen", "rejected", "system"))


def with_system(system: Any, messages: list[Message]) -> list[Message]:
    """`messages` with the text of a column `system` as their first message.

    Raises:
        RowError: `system` isn't text, or `messages` begin with another system message.
    """
    if not has_system(system):
        return messages
    if messages and speaker(messages[0]) == "system":
        present = content_text(messages[0].get("content"))
        if present.strip() != system.strip():
            raise _two_systems("the column system", system, "the messages", present)
        return messages
    return [{"role": "system", "content": system}, *messages]


def has_system(system: Any) -> bool:
    """Whether the column `system` says anything; raises a RowError if it isn't text."""
    if system is None:
        return False
    refuse_messages(text_of(system, "system"), "system")
    return bool(system.strip())


def _read_answer(value: Any, what: str, roles: Mapping[str, str]) -> list[Message]:
    if isinstance(value, list | tuple) and not value:
        return []
    return read_answer(value, what, roles)


def _divide(
    prompt: list[Message] | str | None,
    chosen: list[Message],
    rejected: list[Message],
    what: str,
) -> tuple[list[Message], list[Message], list[Message]]:
    """Prompt, chosen and rejected, without a message that is in two of them."""
    if prompt is None:
        return split_messages(chosen, rejected)
    given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if prompt is given and _repeated(given, chosen, rejected):
        return given, chosen[len(given) :], rejected[len(given) :]
    common = _common_prompt(chosen, rejected)
    if common is None:
        _check_speakers(chosen, rejected)
        return given, chosen, rejected
    size = len(common)
    if isinstance(prompt, str):
        if not _holds(common, prompt):
            raise _no_place(what)
        before = []
    else:
        before = _not_in_conversation(prompt, common, (chosen, rejected), what)
    return [*before, *common], chosen[size:], rejected[size:]


def _common_prompt(chosen: list[Message], rejected: list[Message]) -> list[Message] | None:
    """The common prompt of two whole conversations; None if the answers are only answers.

    Raises:
        RowError: only one is a whole conversation, or they have no prompt in common.
    """
    whole = [speaker(answer[0]) in _ASKS for answer in (chosen, rejected)]
    if not any(whole):
        return None
    if not all(whole):
        one, other = ("chosen", "rejected") if whole[0] else ("rejected", "chosen")
        raise RowError(
            f"{one} begins with a message from the user or the system and {other} doesn't, so only "
            "one of them is a whole conversation; write both in one way"
        )
    return split_messages(chosen, rejected)[0]


def _repeated(prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> bool:
    """Whether both answers begin with the whole prompt, and go on with an answer to it."""
    size = len(prompt)
    if min(len(chosen), len(rejected)) <= size:
        return False
    if not (same(chosen[:size], prompt) and same(rejected[:size], prompt)):
        return False
    if all(speaker(message) in ("assistant", "tool") for message in prompt):
        return False  # an answer may well begin as the conversation did so far
    # If the conversations have further questions in common, `prompt` is only their beginning.
    shared = 0
    for first, second in zip(chosen[size:], rejected[size:], strict=False):
        if not same(first, second):
            break
        shared += 1
    further = [*chosen[size : size + shared], chosen[size], rejected[size]]
    return not any(speaker(message) in _ASKS for message in further)


def _not_in_conversation(
    prompt: list[Message],
    common: list[Message],
    whole: tuple[list[Message], list[Message]],
    what: str,
) -> list[Message]:
    """The messages of `prompt` that belong before two conversations, which repeat the others.

    Args:
        prompt: what the row gives as the prompt.
        common: the prompt of the conversations.
        whole: the conversations.
        what: name of the column that `prompt` is from.
    """
    said = list(map(_said, common))
    systems = 0
    while systems < len(prompt) and speaker(prompt[systems]) == "system":
        systems += 1
    turns = list(map(_said, prompt[systems:]))
    if any(_is_part(turns, list(map(_said, answer))) for answer in whole):
        before = [message for message in prompt[:systems] if _said(message) not in said]
    else:
        overlap = next(
            (n for n in range(min(len(turns), len(said)), 0, -1) if turns[-n:] == said[:n]), 0
        )
        if not overlap:
            raise _no_place(what)
        before = prompt[: len(prompt) - overlap]
    for message in prompt:
        if all(message is not other for other in before):
            _check_quoted(message, [m for answer in whole for m in answer], what)
    if before and speaker(common[0]) == "system" and said[0] not in map(_said, prompt):
        first, second = (content_text(m.get("content")) for m in (before[0], common[0]))
        raise _two_systems(what, first, "the conversations", second)
    return before


def _check_quoted(message: Message, among: list[Message], what: str) -> None:
    """Refuse a quoted message with fields that the message in the conversations doesn't have."""
    said = _said(message)
    missing: list[str] = []
    for other in among:
        if _said(other) == said:
            missing = [
                name
                for name, field in message.items()
                if name not in ("role", "content", *CALLS, *WEIGHT_FIELDS)
                and field is not None
                and not same(field, other.get(name))
            ]
            if not missing:
                return
    if missing:
        raise RowError(
            f"{what} has a message with {', '.join(missing)}, which the same message of chosen and "
            "rejected doesn't have; write it in the same way everywhere"
        )


def _check_speakers(chosen: list[Message], rejected: list[Message]) -> None:
    """Refuse answers that begin with somebody of whom nobody knows whether they ask."""
    shared = same(chosen[0], rejected[0])
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        roles = list(dict.fromkeys(str(message["role"]) for message in answer))
        if len(roles) == 1 or roles[0].strip().lower() in ROLES:
            continue
        # A template may have a role for thoughts, but hardly twice the same thought.
        if shared or "assistant" not in map(speaker, answer):
            mapping = {roles[0]: "user", roles[1]: "assistant"}
            raise RowError(
                f"{name} begins with a message from {roles[0]!r}, and nothing says whether it asks "
                f"or answers; say it with {naming('roles', mapping)}"
            )


def _said(message: Message) -> tuple[Any, ...]:
    """What a message says, apart from white space and fields that `_check_quoted` compares."""
    calls = [as_json(message.get(name) or None) for name in CALLS]
    return speaker(message), content_text(message.get("content")).strip(), *calls


def _holds(messages: list[Message], text: str) -> bool:
    """Whether `text` is a part of what `messages` say one after the other, white space aside."""
    said = "".join(content_text(message.get("content")) for message in messages)
    return "".join(text.split()) in "".join(said.split())


def _is_part(turns: list[Any], of: list[Any]) -> bool:
    size = len(turns)
    return any(of[start : start + size] == turns for start in range(len(of) - size + 1))


def _no_place(what: str) -> RowError:
    return RowError(
        f"{what} says something that isn't in the conversations of chosen and rejected, and "
        f"nothing says where it belongs; write it into both, or remove {what} to train without it"
    )


def _two_systems(first: str, text: str, second: str, other: str) -> RowError:
    return RowError(
        f"{first} has the system message {shown(text)} and {second} {shown(other)}; keep one"
    )
