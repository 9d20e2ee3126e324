"""Finds the pair in rows that other tools write under names and in forms of their own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from dpofast.data.reading.json_text import parse_messages
from dpofast.data.reading.messages import mapped_role, speaker
from dpofast.data.reading.pair import Row
from dpofast.data.reading.row_error import RowError, naming, shown

# Columns that mean the same as chosen and rejected: LLaMA-Factory; torchtune and XTuner; NeMo and
# Axolotl's Argilla form.
_ANSWER_NAMES = tuple(
    (f"chosen_{name}", f"rejected_{name}") for name in ("messages", "conversations", "response")
)
_OPENAI = ("preferred_output", "non_preferred_output")
# Fields of OpenAI's `input`. The last one is a setting of the API that no template knows.
_OPENAI_INPUT = ("messages", "tools", "parallel_tool_calls")
OTHER_COLUMNS = (*(name for pair in _ANSWER_NAMES for name in pair), *_OPENAI)


def under_our_names(values: Mapping[str, Any], roles: Mapping[str, str]) -> Row:
    """The row with its answers in `chosen` and `rejected`, wherever the source has them.

    Args:
        values: the row's columns.
        roles: role in the source -> role that templates know.
    Raises:
        RowError: the row is in a known form of another tool, but can't be used.
    """
    if values.get("chosen") is not None or values.get("rejected") is not None:
        return Row(values)
    # A null answer is an empty one. But Arrow gives a row the columns of all rows, so a form whose
    # answers are both there comes first.
    for complete in (True, False):
        if _has_pair(values, _OPENAI, complete):
            return _from_openai(values)
        for names in _ANSWER_NAMES:
            if _has_pair(values, names, complete):
                return _renamed(values, dict(zip(("chosen", "rejected"), names, strict=True)))
        for column in ("messages", "conversations"):
            for rejected in ("rejected_messages", "rejected_response"):
                if values.get(column) is not None and _has_pair(
                    values, (column, rejected), complete
                ):
                    return _from_swift(values, column, rejected, roles)
    return Row(values)


def _has_pair(values: Mapping[str, Any], names: tuple[str, str], complete: bool) -> bool:
    """Whether a row has these two columns, with a value in both or at least in one of them."""
    filled = [values[name] is not None for name in names if name in values]
    if len(filled) < len(names) or (not complete and {"chosen", "rejected"} & set(values)):
        return False
    return all(filled) if complete else any(filled)


def _renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> Row:
    """Take columns under our names: our column -> the source's."""
    taken = {column: value for column, value in values.items() if column not in names.values()}
    taken.update({ours: values[theirs] for ours, theirs in names.items()})
    return Row(taken, names, {ours: frozenset({theirs}) for ours, theirs in names.items()})


def _from_openai(values: Mapping[str, Any]) -> Row:
    """OpenAI's form: {"input": {"messages": ..., "tools": ...}, "preferred_output": ..., ...}."""
    given = values.get("input")
    if isinstance(given, str):
        with suppress(ValueError, RecursionError):  # refused below, because it is no object
            given = json.loads(given)
    if not isinstance(given, Mapping) or given.get("messages") is None:
        raise RowError(
            f"input is not an object with messages but {shown(given)}; preferred_output needs "
            '{"messages": [...]} as input'
        )
    unknown = [name for name, value in given.items() if value and name not in _OPENAI_INPUT]
    if unknown:
        raise RowError(
            f"input has {', '.join(unknown)}, which isn't used here; remove it, or write it into "
            "the messages"
        )
    if given.get("tools") is not None and values.get("tools") is not None:
        raise RowError("there are tools in input and in the column tools; give them once")
    names = {"chosen": _OPENAI[0], "rejected": _OPENAI[1], "messages": "input.messages"}
    sources = {"chosen": {_OPENAI[0]}, "rejected": {_OPENAI[1]}, "messages": {"input"}}
    taken = {column: v for column, v in values.items() if column not in ("input", *_OPENAI)}
    taken.update(chosen=values[_OPENAI[0]], rejected=values[_OPENAI[1]], messages=given["messages"])
    taken.pop("prompt", None)  # the form has a prompt already
    if given.get("tools") is not None:  # an empty list isn't the same as none for some templates
        taken["tools"] = given["tools"]
        sources["tools"] = {"input"}
    return Row(taken, names, {column: frozenset(found) for column, found in sources.items()})


def _from_swift(
    values: Mapping[str, Any], column: str, rejected: str, roles: Mapping[str, str]
) -> Row:
    """ms-swift's form: a conversation that ends with the chosen answer, and the rejected one.

    `rejected_messages` is a whole conversation. `rejected_response` is only what takes the place of
    the messages after the last one from the user.
    """
    conversation = parse_messages(values[column], column)
    names = {"chosen": column, "rejected": rejected}
    sources = {ours: frozenset({theirs}) for ours, theirs in names.items()}
    taken = {name: v for name, v in values.items() if name not in (column, rejected, "prompt")}
    taken["rejected"] = values[rejected]
    if rejected == "rejected_messages":
        return Row({**taken, "chosen": conversation}, names, sources)
    end = _after_last_question(conversation, column, roles)
    taken.update(messages=conversation[:end], chosen=conversation[end:])
    names |= {"messages": column, "chosen": f"{column}[{end}:]"}
    return Row(taken, names, {**sources, "messages": frozenset({column})})


def _after_last_question(conversation: Any, column: str, roles: Mapping[str, str]) -> int:
    """Where the answer begins: after the last message from the user.

    Raises:
        RowError: there is no such place.
    """
    if isinstance(conversation, list | tuple):
        ends = [
            index + 1
            for index, message in enumerate(conversation)
            if isinstance(message, Mapping) and _asks(message, roles)
        ]
        if ends and ends[-1] < len(conversation):
            return ends[-1]
    raise RowError(
        f"{column} doesn't end with an answer to the user, but with rejected_response it holds the "
        "chosen answer; put that at its end, or name its column with "
        + naming("columns", {"chosen": "your_column", "rejected": "rejected_response"})
    )


def _asks(message: Mapping[str, Any], roles: Mapping[str, str]) -> bool:
    name = str(message.get("role") or message.get("from"))
    return speaker({"role": mapped_role(name, roles) or name}) == "user"
