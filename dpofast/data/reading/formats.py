"""Recognises the formats in which users write preference pairs, and reads one pair of each."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dpofast.columns import ID_COLUMNS, PAIR_COLUMNS, REF_COLUMNS
from dpofast.data.reading.implicit import split_messages, split_texts
from dpofast.data.reading.messages import (
    Message,
    is_empty_answer,
    is_messages,
    read_answer,
    read_messages,
)
from dpofast.data.reading.row_error import RowError, shown, text_of

# Columns that some format reads; all others are ignored.
COLUMNS = (
    *PAIR_COLUMNS,
    *("messages", "conversations"),
    *("instruction", "input", "system", "history"),
    *ID_COLUMNS,
    *("tools", "chat_template_kwargs", "plain_prompt"),
    *REF_COLUMNS,
    "row",
)
# Arguments of `apply_chat_template` that the program sets.
_RESERVED_KWARGS = {"conversation", "tools", "tokenize", "add_generation_prompt"} | {
    *("continue_final_message", "return_dict", "return_tensors", "padding", "truncation"),
    *("max_length", "return_assistant_tokens_mask", "tokenizer_kwargs"),
}


@dataclass(frozen=True, slots=True)
class Pair:
    """One pair in the normal form.

    Attributes:
        kind: type of the prompt and the answers: "text", "messages" or "ids".
        columns: names of the columns that the pair was read from, used in errors.
        values: column -> value, for all columns of the normal form except `row`.
    """

    kind: str
    columns: str
    values: dict[str, Any] = field(default_factory=dict)
    used: frozenset[str] = frozenset(COLUMNS)

    @property
    def identical(self) -> bool:
        _, chosen, rejected = ID_COLUMNS if self.kind == "ids" else PAIR_COLUMNS
        return bool(self.values[chosen] == self.values[rejected])

    @property
    def blank(self) -> str | None:
        """The answer that is empty, if one is."""
        for column in ("chosen", "rejected"):
            answer = self.values.get(column)
            if (isinstance(answer, str) and not answer.strip()) or (
                isinstance(answer, list) and is_empty_answer(answer)
            ):
                return column
        return None


def read_pairs(
    row: Mapping[str, Any], found: Sequence[str], roles: Mapping[str, str]
) -> list[Pair]:
    """Bring one row to the normal form."""
    return [read_pair(row, found, roles)]


def read_pair(row: Mapping[str, Any], found: Sequence[str], roles: Mapping[str, str]) -> Pair:
    """Bring one row to the normal form.

    Args:
        row: the row's columns, after renaming.
        found: names of all columns in the source, used in errors.
        roles: role in the source -> role that templates know; wins over the built-in mapping.
    Raises:
        RowError: the row can't be used; says why and what to do.
    """
    # Ids come first: tokenised files often keep the texts that they were made from.
    if all(row.get(column) is not None for column in ID_COLUMNS):
        pair = Pair("ids", "tokenised prompt_ids", {c: _read_ids(row[c], c) for c in ID_COLUMNS})
    else:
        # A row for KTO would fail both checks, because it has no `chosen`. Its owner is helped more
        # by the message that the rows are unpaired, so that check comes first.
        _refuse_unpaired(row)
        _require_answers(row, found)
        pair = _read_written_pair(row, roles)
        pair.values.update(_template_options(row))
    pair.values.update(_reference_logps(row))
    return pair


def _read_written_pair(row: Mapping[str, Any], roles: Mapping[str, str]) -> Pair:
    # The order matters: a file with prompts often has the chosen conversation in `messages`, too.
    if "prompt" in row:
        return _read_explicit(row, roles)
    for column in ("messages", "conversations"):
        if row.get(column) is not None:
            prompt = _with_system(row, read_messages(row[column], column, roles))
            return _read_conversation(row, prompt, f"{column}, chosen, rejected", roles)
    if row.get("instruction") is not None:
        return _read_instruction(row, roles)
    return _read_implicit(row, roles)


def _read_explicit(row: Mapping[str, Any], roles: Mapping[str, str]) -> Pair:
    """A row with a prompt column."""
    prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    columns = "prompt, chosen, rejected"
    if is_messages(prompt) or isinstance(prompt, list | tuple):
        pair = _read_conversation(row, read_messages(prompt, "prompt", roles), columns, roles)
        # An instruction row in the normal form, read again.
        if isinstance(row.get("plain_prompt"), str):
            pair.values["plain_prompt"] = text_of(row["plain_prompt"], "plain_prompt")
        return pair
    prompt = text_of(prompt, "prompt")
    if is_messages(chosen) and is_messages(rejected):
        user: list[Message] = [{"role": "user", "content": prompt}]
        return _read_conversation(row, user, columns, roles)
    values = {"prompt": prompt, **_answer_texts(chosen, rejected)}
    return Pair("text", columns, values)


def _read_conversation(
    row: Mapping[str, Any], prompt: list[Message], columns: str, roles: Mapping[str, str]
) -> Pair:
    """A row whose prompt is messages, given as `prompt`."""
    chosen = read_answer(row["chosen"], "chosen", roles)
    rejected = read_answer(row["rejected"], "rejected", roles)
    size = len(prompt)
    if min(len(chosen), len(rejected)) > size and chosen[:size] == prompt == rejected[:size]:
        # The answers repeat the whole prompt.
        chosen, rejected = chosen[size:], rejected[size:]
    elif all(answer[0]["role"] in ("system", "user") for answer in (chosen, rejected)):
        # The answers are whole conversations, and the prompt column only quotes from them.
        prompt, chosen, rejected = split_messages(chosen, rejected)
    return _messages_pair(columns, prompt, chosen, rejected)


def _read_implicit(row: Mapping[str, Any], roles: Mapping[str, str]) -> Pair:
    """A row without a prompt column, whose answers both begin with the prompt."""
    columns = "chosen, rejected"
    if isinstance(row["chosen"], str) and isinstance(row["rejected"], str):
        texts = _answer_texts(row["chosen"], row["rejected"])
        prompt, chosen, rejected = split_texts(texts["chosen"], texts["rejected"])
        return Pair("text", columns, {"prompt": prompt, **_answer_texts(chosen, rejected)})
    for column in ("chosen", "rejected"):
        if not isinstance(row[column], list | tuple | Mapping):
            # Raises for a number or null. Its error asks for text, which is more likely what the
            # user wanted to write than messages.
            text_of(row[column], column)
    chosen_messages = read_answer(row["chosen"], "chosen", roles)
    rejected_messages = read_answer(row["rejected"], "rejected", roles)
    return _messages_pair(columns, *split_messages(chosen_messages, rejected_messages))


def _read_instruction(row: Mapping[str, Any], roles: Mapping[str, str]) -> Pair:
    """A row in Alpaca's format: instruction and input become one message from the user.

    The pair also gets `plain_prompt`, for tokenizers without a chat template.
    """
    instruction = text_of(row["instruction"], "instruction")
    given = "" if row.get("input") is None else text_of(row["input"], "input")
    if not (instruction.strip() or given.strip()):
        raise RowError("instruction and input are both empty; give one of them a text")
    content = f"{instruction}\n{given}" if given else instruction
    history = _read_history(row.get("history"))
    prompt = _with_system(row, [*history, {"role": "user", "content": content}])
    columns = "instruction, input, chosen, rejected"
    pair = _read_conversation(row, prompt, columns, roles)
    # Alpaca's headings have no place for earlier turns.
    if not history and isinstance(row["chosen"], str) and isinstance(row["rejected"], str):
        system = prompt[0]["content"] if prompt[0]["role"] == "system" else None
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
    """Messages from the column `history`, a list of [question, answer]."""
    messages: list[Message] = []
    for index, turn in enumerate(value if isinstance(value, list) else []):
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise RowError(f"history[{index}] is not a list of two texts but {shown(turn)}")
        for role, text in zip(("user", "assistant"), turn, strict=True):
            messages.append({"role": role, "content": text_of(text, f"history[{index}]")})
    if value is not None and not isinstance(value, list):
        raise RowError(f"history is not a list of [question, answer] but {shown(value)}")
    return messages


def _with_system(row: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    system = row.get("system")
    if system is None or system == "" or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": text_of(system, "system")}, *messages]


def _messages_pair(
    columns: str, prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> Pair:
    return Pair("messages", columns, {"prompt": prompt, "chosen": chosen, "rejected": rejected})


def _answer_texts(chosen: Any, rejected: Any) -> dict[str, str]:
    return {"chosen": text_of(chosen, "chosen"), "rejected": text_of(rejected, "rejected")}


def _read_ids(value: Any, column: str) -> list[int]:
    ids = value.tolist() if hasattr(value, "tolist") else value  # an array or a tensor
    if not isinstance(ids, list | tuple):
        raise RowError(f"{column} is not a list of token ids but {shown(value)}")
    if not ids:
        raise RowError(f"{column} is empty; give it at least one token or remove the row")
    for token in ids:  # ids are stored as int32; True is an int, but no id
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < 2**31:
            raise RowError(f"{column} holds {shown(token)}, which is not a token id")
    return list(ids)


def _template_options(row: Mapping[str, Any]) -> dict[str, str]:
    """The columns `tools` and `chat_template_kwargs` as JSON text.

    If they were stored as structs, Arrow would give every row the fields of all rows, with nulls.
    """
    options = {}
    for column, kind in (("tools", list), ("chat_template_kwargs", dict)):
        value = row.get(column)
        if value is None or value in ("", [], {}):
            continue
        try:
            value = json.loads(value) if isinstance(value, str) else value
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


def _reference_logps(row: Mapping[str, Any]) -> dict[str, float]:
    """Reference log-probs by column, if the row has them; otherwise an empty dict."""
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
            raise RowError(f"{column} is {shown(value)}, expected a finite number")
    return logps


def _refuse_unpaired(row: Mapping[str, Any]) -> None:
    """Refuse rows for KTO, which have one answer and a label."""
    if "chosen" in row or "rejected" in row:
        return
    labels = [column for column in ("label", "kto_tag") if column in row]
    if labels and {"completion", "messages", "conversations", "output", "prompt"} & set(row):
        raise RowError(
            f"these are unpaired rows, each with one answer and {labels[0]!r} (KTO), and DPO needs "
            "pairs; join a good and a bad answer of the same prompt to one row with chosen and "
            "rejected, or train this file with a KTO trainer"
        )


def _require_answers(row: Mapping[str, Any], found: Sequence[str]) -> None:
    for column in ("chosen", "rejected"):
        if column in row:
            if row[column] is None:
                raise RowError(f"{column} is null; give it an answer or remove the row")
            continue
        near = difflib.get_close_matches(column, [str(name) for name in found], n=1)
        example = near[0] if near else "your_column"
        raise RowError(
            f"there is no column {column!r} (found: {', '.join(map(str, found)) or 'none'}); name "
            f"it with columns={{{column!r}: {example!r}}} or add it"
        )
