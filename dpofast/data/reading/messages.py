"""Reads chat messages in the forms that users write, and brings them to one form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dpofast.data.reading.row_error import RowError, empty_answer, shown, text_of

# A message in the normal form. Its keys are "role"; "content", which is None if the message only
# calls tools; and "extra", if it has more fields: those fields as a JSON object.
Message = dict[str, str | None]

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


def is_messages(value: Any) -> bool:
    """Whether `value` looks like messages: an object, or a list that contains an object."""
    if isinstance(value, Mapping):
        return True
    return isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value)


def read_messages(value: Any, what: str, roles: Mapping[str, str]) -> list[Message]:
    """Bring messages to the normal form.

    Args:
        value: a list of messages, or one message.
        what: name of the value, used in errors.
        roles: role in the source -> role that templates know; wins over the built-in ROLES.
    Raises:
        RowError: `value` isn't messages, or is empty, or a message has no role or no content.
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
    """Bring an answer to the normal form; a text becomes one message from the assistant."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": text_of(value, what)}]
    return read_messages(value, what, roles)


def check_answer(messages: list[Message], what: str) -> None:
    """Refuse an answer without any text or tool call, which would teach nothing.

    Raises:
        RowError: the answer is empty.
    """
    for message in messages:
        if (message["content"] or "").strip() or message.get("extra"):
            return
    raise empty_answer(what)


def to_template(message: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a message of the normal form into the dict that chat templates expect."""
    extra = message.get("extra")
    plain = {"role": message["role"], "content": message["content"]}
    return {**plain, **json.loads(extra)} if extra else plain


def _read_message(item: Any, what: str, roles: Mapping[str, str]) -> Message:
    if not isinstance(item, Mapping):
        raise RowError(
            f"{what} is not a message but {type(item).__name__} {shown(item)}; "
            'write {"role": "user", "content": "..."}'
        )
    # Arrow adds to each message all fields that any message has, as nulls.
    fields = {key: field for key, field in item.items() if field is not None}
    if "role" not in fields and "from" not in fields:
        raise RowError(
            f"{what} has neither role nor from (found: {', '.join(map(str, fields)) or 'nothing'})"
            "; say who speaks"
        )
    if "role" in fields:
        role = _read_role(fields.pop("role"), what, roles, known_only=False)
        content = fields.pop("content", None)
    else:
        role = _read_role(fields.pop("from"), what, roles, known_only=True)
        content = fields.pop("value", None)
    extra = _read_extra(fields, what)
    message: Message = {"role": role, "content": None}
    if isinstance(content, list):
        extra["content"] = _read_blocks(content, what)
    elif content is not None or not extra.get("tool_calls"):
        if content is None and "content" not in extra:
            raise RowError(f"the content of {what} is null or missing; give it a text")
        message["content"] = None if content is None else text_of(content, f"content of {what}")
    if extra:
        # Keys are sorted, so that the order of a message's fields doesn't make it differ.
        message["extra"] = json.dumps(extra, sort_keys=True, ensure_ascii=False)
        text_of(message["extra"], what)  # refuses half a surrogate pair
    return message


def _read_role(value: Any, what: str, roles: Mapping[str, str], known_only: bool) -> str:
    role = text_of(value, f"role of {what}").strip()
    mapped = roles.get(role) or ROLES.get(role.lower())
    if mapped is None and (known_only or not role):
        raise RowError(
            f"the role of {what} is {shown(value)}, expected one of {', '.join(ROLES)}; "
            f"map it with roles={{{shown(value)}: 'user'}}"
        )
    # A template can define roles of its own, so role/content messages may have unknown roles.
    return mapped or role


def _read_extra(fields: dict[Any, Any], what: str) -> dict[str, Any]:
    """The remaining fields of a message, such as tool calls, a name or its reasoning."""
    packed = fields.pop("extra", None)
    extra = {str(key): _without_nulls(field) for key, field in fields.items()}
    try:
        if isinstance(packed, str):  # already in the normal form
            loaded = json.loads(packed)
            extra.update(loaded if isinstance(loaded, dict) else {"extra": packed})
        elif packed is not None:
            extra["extra"] = _without_nulls(packed)
        json.dumps(extra)
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError(f"{what} has a field that is not plain JSON ({error})") from None
    return {key: field for key, field in extra.items() if field not in ([], {})}


def _read_blocks(blocks: list[Any], what: str) -> list[dict[str, Any]]:
    """Check that content given as a list of blocks is text only."""
    for block in blocks:
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind != "text":
            raise RowError(
                f"the content of {what} has a block of type {shown(kind)}; only text can be "
                "trained on here, so leave images and sound out"
            )
        text_of(block.get("text"), f"text of {what}")
    if not any(block["text"].strip() for block in blocks):
        raise RowError(f"the content of {what} is empty; give it a text or remove the row")
    return [_without_nulls(dict(block)) for block in blocks]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(item) for item in value]
    return value
