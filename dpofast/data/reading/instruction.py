"""Reads rows in Alpaca's format: instruction and input."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from dpofast.data.reading.conversation import has_system, read_conversation
from dpofast.data.reading.json_text import refuse_messages
from dpofast.data.reading.messages import Message
from dpofast.data.reading.pair import Pair, Row
from dpofast.data.reading.row_error import RowError, shown, text_of


def read_instruction(row: Row, roles: Mapping[str, str]) -> Pair:
    """The pair, or the unpaired row, whose prompt is one message: the instruction and the input.

    It also gets `plain_prompt`, for tokenizers without a chat template.

    Raises:
        RowError: the row can't be used.
    """
    instruction = text_of(row.get("instruction"), "instruction")
    given = "" if row.get("input") is None else text_of(row.get("input"), "input")
    refuse_messages(instruction, "instruction")
    if not (instruction.strip() or given.strip()):
        raise RowError("instruction and input are both empty; give one of them a text")
    content = f"{instruction}\n{given}" if given else instruction
    history = _read_history(row.get("history"))
    prompt: list[Message] = [*history, {"role": "user", "content": content}]
    columns = row.listed("instruction", "input", *row.answers)
    used = row.used("instruction", "input", "history")
    pair = read_conversation(row, prompt, "instruction", columns, roles, used)
    # Alpaca's headings have no place for earlier turns.
    if not history and all(isinstance(row.get(column), str) for column in row.answers):
        system = row.get("system") if has_system(row.get("system")) else None
        pair.values["plain_prompt"] = plain_instruction(instruction, given, system)
    return pair


def plain_instruction(instruction: str, given: str, system: str | None = None) -> str:
    """The prompt of an instruction row as plain text under Alpaca's headings.

    It is for tokenizers without a chat template. The answer follows right after it.

    Args:
        instruction, given: the columns `instruction` and `input`.
        system: the system message, if there is one.
    """
    parts = [system] if system else []
    parts.append(f"### Instruction:\n{instruction}")
    if given:
        parts.append(f"### Input:\n{given}")
    parts.append("### Response:\n")
    return "\n\n".join(parts)


def _read_history(value: Any) -> list[Message]:
    """Messages from the column `history`, a list of [question, answer] or its JSON."""
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):  # refused below, because it is no list
            value = json.loads(value) if value.strip() else None
    if value is not None and not isinstance(value, list):
        raise RowError(f"history is not a list of [question, answer] but {shown(value)}")
    messages: list[Message] = []
    for index, turn in enumerate(value or []):
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise RowError(f"history[{index}] is not a list of two texts but {shown(turn)}")
        for role, text in zip(("user", "assistant"), turn, strict=True):
            messages.append({"role": role, "content": text_of(text, f"history[{index}]")})
    return messages
