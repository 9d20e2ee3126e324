"""Finds the prompt of answers that are messages, wherever a row has it: apart, repeated, quoted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpofast.columns import PAIRED
from dpofast.data.reading.implicit import shared_length, split_messages
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
    """The pair, or the unpaired row, of a row whose answers are messages.

    Args:
        row: the row.
        prompt: messages that the row gives as the prompt, or the text of one from the user; None if
            all answers begin with it.
        what: name of the column that `prompt` is from, used in errors.
        columns: names of the columns of the form.
        roles: role in the source -> role that templates know.
        used: columns of the source that the prompt was made from.
    Raises:
        RowError: the messages have no answer, or a part of the prompt has no place in them.
    """
    names = row.answer_names
    written = [_read_answer(row.get(c), row.name(c), roles) for c in row.answers]
    answers: Sequence[list[Message]] = written
    if isinstance(prompt, list):
        check_contents(prompt, what)
    if all(written):
        prompt, answers = _divide(prompt, written, what, row)
    elif not isinstance(prompt, list):
        prompt = []  # the empty answer has the row left out
    if not any(map(is_empty_answer, answers)):
        for messages, name in zip(written, names, strict=True):
            check_contents(messages, name)
    prompt = with_system(row.get("system"), prompt)
    for messages, name in zip(answers, names, strict=True):
        refuse_weights(messages, name)
    values = {"prompt": prompt, **dict(zip(row.answers, answers, strict=True))}
    used = used | row.used(*row.answers, "system")
    return Pair("messages", columns, values, used, row.kind)


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
    answers: Sequence[list[Message]],
    what: str,
    row: Row,
) -> tuple[list[Message], Sequence[list[Message]]]:
    """The prompt and the answers, without a message that is in both."""
    if prompt is None:
        common, *rest = split_messages(*answers, names=row.answer_names)
        return common, rest
    given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if prompt is given and _repeated(given, answers):
        return given, [answer[len(given) :] for answer in answers]
    whole = _common_prompt(answers, row)
    if whole is None:
        _check_speakers(answers, row)
        return given, answers
    if isinstance(prompt, str):
        if not _holds(whole, prompt):
            raise _no_place(what, row)
        before = []
    else:
        before = _not_in_conversation(prompt, whole, answers, what, row)
    return [*before, *whole], [answer[len(whole) :] for answer in answers]


def _common_prompt(answers: Sequence[list[Message]], row: Row) -> list[Message] | None:
    """The common prompt of whole conversations; None if the answers are only answers.

    Raises:
        RowError: only one is a whole conversation, or they have no prompt in common.
    """
    whole = [speaker(answer[0]) in _ASKS for answer in answers]
    if not any(whole):
        return None
    if not all(whole):
        one, other = row.answers[whole.index(True)], row.answers[whole.index(False)]
        raise RowError(
            f"{one} begins with a message from the user or the system and {other} doesn't, so only "
            "one of them is a whole conversation; write both in one way"
        )
    return split_messages(*answers, names=row.answer_names)[0]


def _repeated(prompt: list[Message], answers: Sequence[list[Message]]) -> bool:
    """Whether all answers begin with the whole prompt, and go on with an answer to it."""
    size = len(prompt)
    if min(map(len, answers)) <= size:
        return False
    if not all(same(answer[:size], prompt) for answer in answers):
        return False
    if all(speaker(message) in ("assistant", "tool") for message in prompt):
        return False  # an answer may well begin as the conversation did so far
    # If the conversations have further questions in common, `prompt` is only their beginning.
    rest = [answer[size:] for answer in answers]
    further = [*rest[0][: shared_length(*rest)], *(answer[0] for answer in rest)]
    return not any(speaker(message) in _ASKS for message in further)


def _not_in_conversation(
    prompt: list[Message],
    common: list[Message],
    whole: Sequence[list[Message]],
    what: str,
    row: Row,
) -> list[Message]:
    """The messages of `prompt` that belong before conversations, which repeat the others.

    Args:
        prompt: what the row gives as the prompt.
        common: the prompt of the conversations.
        whole: the conversations.
        what: name of the column that `prompt` is from.
        row: the row, which names the conversations.
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
            raise _no_place(what, row)
        before = prompt[: len(prompt) - overlap]
    for message in prompt:
        if all(message is not other for other in before):
            _check_quoted(message, [m for answer in whole for m in answer], what, row)
    if before and speaker(common[0]) == "system" and said[0] not in map(_said, prompt):
        first, second = (content_text(m.get("content")) for m in (before[0], common[0]))
        raise _two_systems(what, first, "the conversations", second)
    return before


def _check_quoted(message: Message, among: list[Message], what: str, row: Row) -> None:
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
            f"{what} has a message with {', '.join(missing)}, which the same message of "
            f"{' and '.join(row.answers)} doesn't have; write it in the same way everywhere"
        )


def _check_speakers(answers: Sequence[list[Message]], row: Row) -> None:
    """Refuse answers that begin with somebody of whom nobody knows whether they ask."""
    shared = len(answers) > 1 and all(same(answer[0], answers[0][0]) for answer in answers)
    for name, answer in zip(row.answers, answers, strict=True):
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


def _no_place(what: str, row: Row) -> RowError:
    if len(row.answers) == 1:
        (name,) = row.answers
        return RowError(
            f"{what} says something that isn't in the conversation of {name}, and nothing says "
            f"where it belongs; write it into {name}, or remove {what} to train without it"
        )
    answers = " and ".join(row.answers) if row.kind is PAIRED else row.listed(*row.answers)
    return RowError(
        f"{what} says something that isn't in the conversations of {answers}, and "
        f"nothing says where it belongs; write it into both, or remove {what} to train without it"
    )


def _two_systems(first: str, text: str, second: str, other: str) -> RowError:
    return RowError(
        f"{first} has the system message {shown(text)} and {second} {shown(other)}; keep one"
    )
