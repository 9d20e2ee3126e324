"""Reads what a row says besides its prompt and answers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from dpofast.columns import LOGP_ROUNDING, REF_COLUMNS
from dpofast.data.reading.messages import Message
from dpofast.data.reading.row_error import RowError, shown, text_of

# Arguments of `apply_chat_template` that the program sets.
_RESERVED_KWARGS = {"conversation", "tools", "tokenize", "add_generation_prompt"} | {
    *("continue_final_message", "return_dict", "return_tensors", "padding", "truncation"),
    *("max_length", "return_assistant_tokens_mask", "tokenizer_kwargs"),
}
# Columns in which TRL and others keep what a text model can't see.
MEDIA_COLUMNS = tuple(
    prefix + name
    for prefix in ("", "prompt_", "chosen_", "rejected_")
    for name in ("image", "images", "audio", "audios", "video", "videos", "pixel_values")
)
# Fields with which other tools say how much a message counts, or whether it counts at all.
WEIGHT_FIELDS = ("weight", "loss_weight", "loss", "train", "training")


def template_options(row: Mapping[str, Any]) -> dict[str, str]:
    """The columns `tools` and `chat_template_kwargs` as JSON text, with the order of the file.

    If they were stored as structs, Arrow would give every row the fields of all rows, with nulls.

    Raises:
        RowError: one of them isn't JSON of the right type, or sets what the program sets.
    """
    options = {}
    for column, kind in (("tools", list), ("chat_template_kwargs", dict)):
        value = row.get(column)
        try:
            if isinstance(value, str):
                value = json.loads(value) if value.strip() else None
            # For some templates, an empty list of tools isn't the same as none.
            if value is None or value == {} or (value == [] and kind is dict):
                continue
            if isinstance(value, list) and all(isinstance(item, str) for item in value):
                value = _parse_each(value)
            # A string is parsed, too: only valid JSON gets into the normal form.
            options[column] = json.dumps(value, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise RowError(f"{column} is not plain JSON ({error})") from None
        if not isinstance(value, kind):
            word = "a list" if kind is list else "an object"
            raise RowError(f"{column} is not {word} but {shown(value)}")
        text_of(options[column], column)
        if reserved := _RESERVED_KWARGS & set(value if kind is dict else ()):
            names = ", ".join(sorted(reserved))
            raise RowError(f"chat_template_kwargs sets {names}, which is set for you; remove it")
    return options


def reference_logps(row: Mapping[str, Any]) -> dict[str, float]:
    """Reference log-probs by column, if the row has them; otherwise an empty dict.

    Raises:
        RowError: one of the two is missing, isn't a finite number, or is above 0.
    """
    given = [column for column in REF_COLUMNS if row.get(column) is not None]
    if len(given) == 1:
        (missing,) = set(REF_COLUMNS) - set(given)
        raise RowError(f"there is {given[0]} but no {missing}; give both or neither")
    logps = {}
    for column in given:
        value = row[column]
        try:
            logps[column] = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            logps[column] = math.nan  # refused below, like every value that isn't finite
        if not math.isfinite(logps[column]):
            raise RowError(
                f"{column} is {shown(value)}, expected a finite number; mend it, or remove both "
                "columns to have the reference scored"
            )
        if logps[column] > LOGP_ROUNDING:
            raise RowError(f"{column} is {shown(value)}, but a log-prob is never above 0")
    return logps


def refuse_media(row: Mapping[str, Any]) -> None:
    """Refuse images, sound and video: the prompt would ask about something that isn't there.

    Raises:
        RowError: a column of MEDIA_COLUMNS holds anything.
    """
    for column in MEDIA_COLUMNS:
        if column in row and not _holds_nothing(row[column]):
            raise RowError(
                f"{column} holds {type(row[column]).__name__} {shown(row[column])}, but only text "
                "can be trained on here; remove the row, or remove the column to train without it"
            )


def refuse_weights(messages: list[Message], what: str) -> None:
    """Refuse an answer with a message that another tool would not score, or score differently.

    Raises:
        RowError: a message has such a field.
    """
    for index, message in enumerate(messages):
        for name in WEIGHT_FIELDS:
            value = message.get(name)
            if value is None or value == 1:  # True is 1
                continue
            raise RowError(
                f"{what}[{index}] has {name} {shown(value)}, but every message of an answer counts "
                f"in full here; move it to the prompt, or remove the field {name}"
            )


def _holds_nothing(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, list | tuple):
        return all(map(_holds_nothing, value))
    return value is None or (isinstance(value, str | bytes) and not value)


def _parse_each(texts: list[str]) -> list[Any]:
    """Tools from a list of JSON texts, one per tool; other texts stay as they are."""
    try:
        tools = [json.loads(text) for text in texts]
    except ValueError:
        return list(texts)
    return tools if all(isinstance(tool, dict) for tool in tools) else list(texts)
