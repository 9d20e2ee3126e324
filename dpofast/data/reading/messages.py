"""Reads chat messages in the forms that users write.

A message stays as the file says it: its fields, their order and the name of its role reach the
chat template unchanged. Only messages with the keys `from` and `value` (ShareGPT) are converted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from dpofast.data.reading.row_error import RowError, naming, shown, text_of
from dpofast.data.reading.written import CALLS as CALLS
from dpofast.data.reading.written import THOUGHTS, holds_blocks, messages_in

# A message: role, content, and any further fields. Its values are plain JSON.
Message = dict[str, Any]

# Names of roles in ShareGPT and similar formats, in lower case -> names that templates know.
ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "ipython": "ipython",
}


def read_messages(value: Any, what: str, roles: Mapping[str, str]) -> list[Message]:
    """Check messages, and convert those in ShareGPT's form.

    A content that is null is left for `check_contents`, because an answer may be empty.

    Args:
        value: a list of messages, or one message.
        what: name of the value, used in errors.
        roles: role in the source -> role that templates know; wins over the built-in ROLES.
    Raises:
        RowError: `value` isn't messages, or is empty, or a message has no role.
    """
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list | tuple):
        raise RowError(
            f"{what} is not a list of messages but {type(value).__name__} {shown(value)}; "
            'write [{"role": "user", "content": "..."}]'
        )
    if not value:
        raise RowError(f"{what} has no messages; give it one or remove the row")
    return [_read_message(item, f"{what}[{i}]", roles) for i, item in enumerate(value)]


def read_answer(value: Any, what: str, roles: Mapping[str, str]) -> list[Message]:
    """Check an answer given as messages; a text becomes one message from the assistant."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": text_of(value, what)}]
    return read_messages(value, what, roles)


def speaker(message: Message) -> str:
    """Who speaks: user, assistant, system or tool, whatever name the data uses for the role."""
    role = str(message["role"])
    name = ROLES.get(role.strip().lower(), role)
    return "system" if name == "developer" else name


def mapped_role(name: str, roles: Mapping[str, str]) -> str | None:
    """The role that `roles` gives for a name, in upper or lower case; None if it has none."""
    if name in roles:
        return roles[name]
    wanted = name.strip().lower()
    return next((role for key, role in roles.items() if key.strip().lower() == wanted), None)


def same(first: Any, second: Any) -> bool:
    """Whether two messages, or lists of them, are written in the same way.

    Python takes 1, 1.0 and true for equal, and objects with their keys in another order. A chat
    template writes them differently.
    """
    return bool(first == second) and as_json(first) == as_json(second)


def content_text(content: Any) -> str:
    """The text of a message's content, which is a text, a list of text blocks, or null."""
    if isinstance(content, list):
        return "".join(block["text"] for block in content)
    return content or ""


def is_empty_answer(messages: list[Message]) -> bool:
    """Whether an answer has neither text, thoughts nor tool calls, so that it teaches nothing."""
    return not any(
        content_text(message.get("content")).strip() or _says_more(message) for message in messages
    )


def check_contents(messages: Iterable[Message], what: str) -> None:
    """Refuse a message whose content is null and that has no other field that says something.

    Args:
        messages: messages that were read.
        what: name of their column, used in errors.
    Raises:
        RowError: there is such a message.
    """
    for index, message in enumerate(messages):
        if message.get("content") is None and not _says_more(message):
            raise RowError(f"the content of {what}[{index}] is null or missing; give it a text")


def as_json(value: Any) -> str:
    """A value as JSON, for comparisons; what isn't JSON is refused when it is stored."""
    return json.dumps(value, default=repr, skipkeys=True)


def _says_more(message: Message) -> bool:
    """Whether a message says something besides its content."""
    return any(
        field.strip() if isinstance(field, str) else field
        for field in map(message.get, (*CALLS, *THOUGHTS))
    )


def encode_messages(messages: Iterable[Message], what: str) -> list[str]:
    """The messages as the normal form stores them: each one as JSON text.

    Structs of Arrow would give every message the fields of all messages, with nulls.

    Args:
        messages: the messages.
        what: name of their column, used in errors.
    Raises:
        RowError: a message has a field that isn't plain JSON, or that can't be stored as text.
    """
    stored = []
    for index, message in enumerate(messages):
        try:
            stored.append(text_of(json.dumps(message, ensure_ascii=False), f"{what}[{index}]"))
        except (TypeError, ValueError, RecursionError) as error:
            raise RowError(
                f"{what}[{index}] has a field that is not plain JSON ({error})"
            ) from None
    return stored


def decode_messages(stored: Iterable[str]) -> list[Message]:
    """The messages that `encode_messages` has stored."""
    return [json.loads(text) for text in stored]


def _read_message(item: Any, what: str, roles: Mapping[str, str]) -> Message:
    if not isinstance(item, Mapping):
        raise RowError(
            f"{what} is not a message but {type(item).__name__} {shown(item)}; "
            'write {"role": "user", "content": "..."}'
        )
    if item.get("role") is not None:
        role = text_of(item["role"], f"role of {what}")
        if not role.strip():
            raise RowError(f"the role of {what} is empty; say who speaks")
        # A template can define roles of its own, so unknown roles are right here.
        message = {**item, "role": mapped_role(role, roles) or role}
    elif item.get("from") is not None:
        message = _from_sharegpt(item, what, roles)
    else:
        found = ", ".join(str(key) for key, field in item.items() if field is not None)
        raise RowError(
            f"{what} has neither role nor from (found: {found or 'nothing'}); say who speaks"
        )
    if isinstance(message.get("content"), list):
        message["content"] = [_read_block(block, what) for block in message["content"]]
    elif message.get("content") is not None:
        _check_text(text_of(message["content"], f"content of {what}"), message, what)
    return message


def _check_text(content: str, message: Message, what: str) -> None:
    """Refuse a content that was blocks or messages before it was written as text."""
    if holds_blocks(content):
        raise RowError(
            f"the content of {what} is a list of blocks written as text; write the list itself"
        )
    # An answer may be about messages.
    asks = speaker(message) in ("user", "system")
    found = messages_in(content) if asks else None
    if found is not None and isinstance(found.value, list) and any(map(_is_spoken, found.value)):
        raise RowError(
            f"the content of {what} is messages written as text; write the messages themselves"
        )


def _is_spoken(item: Any) -> bool:
    """Whether an item of a decoded list is a message with a role that is known."""
    name = item.get("role") or item.get("from") if isinstance(item, Mapping) else None
    return str(name).strip().lower() in ROLES


def _from_sharegpt(item: Mapping[Any, Any], what: str, roles: Mapping[str, str]) -> Message:
    name = text_of(item["from"], f"role of {what}").strip()
    role = mapped_role(name, roles) or ROLES.get(name.lower())
    if role is None:
        raise RowError(
            f"the role of {what} is {shown(name)}, expected one of {', '.join(ROLES)}; "
            f"map it with {naming('roles', {name: 'user'})}"
        )
    given = [item[key] for key in ("value", "content") if item.get(key) is not None]
    if len(given) == 2 and given[0] != given[1]:
        raise RowError(
            f"{what} has value {shown(given[0])} and content {shown(given[1])}; keep one"
        )
    content = given[0] if given else None
    taken = ("from", "value", "role", "content")
    others = {key: field for key, field in item.items() if key not in taken}
    return {"role": role, "content": content, **others}


def _read_block(block: Any, what: str) -> dict[str, Any]:
    """Check a block of a message's content; LLaMA-Factory's `value` becomes `text`."""
    if not isinstance(block, Mapping):
        raise RowError(
            f"the content of {what} is a list with {type(block).__name__} {shown(block)}; write "
            '{"type": "text", "text": "..."}'
        )
    kind = block.get("type")
    if kind != "text":
        if any(word in str(kind) for word in ("image", "audio", "video", "sound", "file")):
            remedy = "only text can be trained on here, so leave images and sound out"
        else:
            remedy = (
                "write it as a block of type 'text', calls of tools into tool_calls, and thoughts "
                "into reasoning_content"
            )
        raise RowError(f"the content of {what} has a block of type {shown(kind)}; {remedy}")
    if block.get("text") is not None and block.get("value") not in (None, block["text"]):
        raise RowError(
            f"the content of {what} has a block with text {shown(block['text'])} and value "
            f"{shown(block['value'])}; keep one"
        )
    renamed = "text" not in block and "value" in block
    block = {"text" if renamed and key == "value" else key: block[key] for key in block}
    text_of(block.get("text"), f"text of {what}")
    return block
