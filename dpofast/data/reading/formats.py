"""Recognises the formats in which users write preference pairs, and reads the pairs of a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dpofast.columns import (
    ID_COLUMNS,
    PAIR_COLUMNS,
    PAIRED,
    RANKED,
    REF_COLUMNS,
    UNPAIRED,
    WEIGHT_COLUMNS,
)
from dpofast.data.reading.answer_pairs import RANKINGS
from dpofast.data.reading.conversation import read_conversation
from dpofast.data.reading.instruction import read_instruction
from dpofast.data.reading.json_text import (
    IMPLICIT,
    JSON,
    MESSAGES,
    TEXT,
    parse_answers,
    parse_messages,
    parse_several,
    speakers,
)
from dpofast.data.reading.kinds import LABELS, wrong_kind
from dpofast.data.reading.messages import read_messages
from dpofast.data.reading.options import (
    MEDIA_COLUMNS,
    reference_logps,
    refuse_media,
    template_options,
)
from dpofast.data.reading.other_names import OTHER_COLUMNS, under_our_names
from dpofast.data.reading.pair import Pair, Row
from dpofast.data.reading.row_error import RowError, naming, text_of
from dpofast.data.reading.text import read_implicit_text, read_text
from dpofast.data.reading.tokenised import (
    LABEL_COLUMNS,
    MASK_COLUMNS,
    OLD_ID_COLUMNS,
    read_tokenised,
)
from dpofast.data.reading.weights import pair_weights
from dpofast.data.reading.written import Written, is_messages, messages_in
from dpofast.spelling import nearest_name

# Columns that some format reads.
COLUMNS = (
    *PAIR_COLUMNS,
    *("messages", "conversations"),
    *("instruction", "input", "system", "history"),
    *OTHER_COLUMNS,
    *(*ID_COLUMNS, *OLD_ID_COLUMNS, *MASK_COLUMNS, *LABEL_COLUMNS),
    *(*UNPAIRED.answers, *UNPAIRED.id_columns[1:], *LABELS),
    *(*RANKED.answers, *RANKED.id_columns[1:], *RANKINGS),
    *("tools", "chat_template_kwargs", "plain_prompt"),
    *MEDIA_COLUMNS,
    *REF_COLUMNS,
    *WEIGHT_COLUMNS,
    "row",
)

# Words beside "chosen" in the name of a column that holds the chosen answers themselves.
# What other files call a list of answers.
_MANY_ANSWERS = ("answers", "responses", "generations", "outputs", "candidates")
_ANSWER_WORDS = frozenset(
    (
        *("answer", "completion", "content", "conversation", "message", "messages", "output"),
        *("reply", "response", "summary", "text"),
    )
)


def read_pairs(
    row: Mapping[str, Any], found: Sequence[str], roles: Mapping[str, str]
) -> list[Pair]:
    """Bring one row to the normal form: one pair for each rejected answer.

    Args:
        row: the row's columns, after renaming.
        found: names of all columns in the source, used in errors.
        roles: role in the source -> role that templates know; wins over the built-in mapping.
    Raises:
        RowError: the row can't be used; says why and what to do.
    """
    refuse_media(row)
    # Ids come first: tokenised files often keep the texts that they were made from.
    if (pair := read_tokenised(row)) is not None:
        return [_with_row_columns(pair, Row(row))]
    ours = under_our_names(row, roles)
    # A row for KTO would fail both checks, because it has no `chosen`. Its owner is helped more
    # by the message that the rows are unpaired, so that check comes first.
    _refuse_other_kind(ours)
    _require_answers(ours, found)
    return [_read_written_pair(one, roles) for one in _each_rejected(ours)]


def _each_rejected(row: Row) -> list[Row]:
    """A row for each rejected answer: a list of texts, or of lists of messages, is several.

    A list of messages is one answer, and so is a list of JSON texts that are messages.
    """
    name = row.name("rejected")
    chosen, value = parse_several(row.get("chosen"), row.get("rejected"), name)
    if not isinstance(value, list | tuple) or messages_in(value).kind == "messages":
        return [row]
    if not any(isinstance(answer, str | list | tuple) for answer in value):
        return [row]  # empty, or no answers at all, which the reader of the answer says
    logps = [row.get(column) for column in REF_COLUMNS]
    if logps != [None, None] and not (isinstance(logps[1], list) and len(logps[1]) == len(value)):
        raise RowError(
            f"{name} has {len(value)} answers, so ref_rejected_logps needs a list of "
            f"{len(value)} numbers"
        )
    rows = []
    for index, answer in enumerate(value):
        values = {**row.values, "chosen": chosen, "rejected": answer}
        if isinstance(logps[1], list):
            values["ref_rejected_logps"] = logps[1][index]
        names = {**row.names, "rejected": f"{name}[{index}]"}
        sources = {**row.sources, "rejected": row.used("rejected")}
        rows.append(Row(values, names, sources))
    return rows


def _read_written_pair(row: Row, roles: Mapping[str, str]) -> Pair:
    return _with_row_columns(read_form(row, roles), row)


def _with_row_columns(pair: Pair, row: Row) -> Pair:
    """The pair with the columns that every form can have."""
    pair = with_template_options(pair, row)
    pair.values.update(reference_logps(row.values))
    pair.values.update(pair_weights(row.values))
    return replace(pair, used=pair.used | row.used(*REF_COLUMNS, *WEIGHT_COLUMNS))


def with_template_options(pair: Pair, row: Row) -> Pair:
    """The pair or unpaired row with what the chat template gets, and the number of its row."""
    given = ["row"] if isinstance(row.get("row"), int) else []
    if pair.kind == "messages":  # nothing else passes a chat template
        pair.values.update(template_options(row.values))
        given += ["tools", "chat_template_kwargs"]
    return replace(pair, used=pair.used | row.used(*given))


def read_form(row: Row, roles: Mapping[str, str]) -> Pair:
    """Read the prompt and the answers of a row, which are in the columns `row.answers`.

    Raises:
        RowError: the row can't be used.
    """
    # The order matters: a file with prompts often has the chosen conversation in `messages`, too.
    if "prompt" in row:
        prompt = parse_messages(row.get("prompt"), "prompt")
        if not _is_absent(prompt, row):
            return _read_explicit(row, prompt, roles)
    for column in ("messages", "conversations"):
        if row.get(column) is not None:
            name = row.name(column)
            prompt = read_messages(parse_messages(row.get(column), name), name, roles)
            columns = row.listed(column, *row.answers)
            used = row.used(column)
            row = _parsed(row, JSON if isinstance(row.get(column), str) else MESSAGES)
            return read_conversation(row, prompt, name, columns, roles, used)
    if row.get("instruction") is not None:
        return read_instruction(_parsed(row, TEXT), roles)
    return _read_implicit(_parsed(row, IMPLICIT), roles)


def _is_absent(prompt: Any, row: Row) -> bool:
    """Whether a prompt column says nothing, and the prompt is in another place.

    Raises:
        RowError: the prompt is nowhere else.
    """
    if prompt == "" or messages_in(prompt).kind != "empty":
        return False
    if any(row.get(column) is not None for column in ("messages", "conversations", "instruction")):
        return True
    answers = [messages_in(row.get(column)) for column in row.answers]
    if all(_is_whole(answer) or answer.kind == "empty" for answer in answers):
        return True
    if isinstance(prompt, str):
        return False
    if prompt is None:
        text_of(prompt, "prompt")
    raise RowError("prompt has no messages; give it one or remove the row")


def _is_whole(answer: Written) -> bool:
    """Whether an answer is a whole conversation: somebody else than the assistant begins."""
    if answer.kind not in ("json", "messages"):
        return False
    first = answer.value if isinstance(answer.value, Mapping) else answer.value[0]
    return not speakers([first]) <= {"assistant", "tool"}


def _read_explicit(row: Row, prompt: Any, roles: Mapping[str, str]) -> Pair:
    """A row with a prompt column, whose JSON text is parsed already."""
    columns, used = row.listed(*row.kind.columns), row.used("prompt")
    if isinstance(prompt, list | tuple | Mapping):
        messages = read_messages(prompt, "prompt", roles)
        row = _parsed(row, JSON if isinstance(row.get("prompt"), str) else MESSAGES)
        pair = read_conversation(row, messages, "prompt", columns, roles, used)
        # An instruction row in the normal form, read again.
        if isinstance(row.get("plain_prompt"), str):
            pair.values["plain_prompt"] = text_of(row.get("plain_prompt"), "plain_prompt")
            pair = replace(pair, used=pair.used | {"plain_prompt"})
        return pair
    prompt = text_of(prompt, "prompt")
    row = _parsed(row, TEXT)
    answers = [row.get(column) for column in row.answers]
    if any(map(_are_messages, answers)) and all(
        isinstance(answer, str) or _are_messages(answer) for answer in answers
    ):
        return read_conversation(row, prompt, "prompt", columns, roles, used)
    return read_text(row)


def _read_implicit(row: Row, roles: Mapping[str, str]) -> Pair:
    """A row without a prompt column, whose answers all begin with the prompt."""
    if all(isinstance(row.get(column), str) for column in row.answers):
        if row.kind is PAIRED:
            return read_implicit_text(row)
        raise RowError(
            f"{row.answer_names[0]} is a text without a prompt, and only a pair shows where a "
            "prompt ends; give the prompt in a column of its own"
        )
    for column in row.answers:
        if not isinstance(row.get(column), list | tuple | Mapping):
            # Raises for a number. Its error asks for text, which is more likely what the user
            # wanted to write than messages.
            text_of(row.get(column), row.name(column))
    columns = row.listed(*row.answers)
    return read_conversation(row, None, "", columns, roles, frozenset())


def _parsed(row: Row, prompt: str) -> Row:
    """The row with answers from JSON text; see `parse_answers`."""
    given = [row.get(column) for column in row.answers]
    answers = parse_answers(given, names=row.answer_names, prompt=prompt)
    values = {**row.values, **dict(zip(row.answers, answers, strict=True))}
    return replace(row, values=values)


def _are_messages(value: Any) -> bool:
    return is_messages(value) or value == []


def _refuse_other_kind(row: Row) -> None:
    """Refuse a row of another kind among pairs; a source of such rows is refused as a whole."""
    if (problem := wrong_kind(row.values, PAIRED)) is not None:
        raise RowError(problem)


def _require_answers(row: Row, found: Sequence[str]) -> None:
    column = next((name for name in PAIRED.answers if name not in row), None)
    if column is None:
        return
    names = ", ".join(map(str, found)) or "none"
    ranking, many = (
        next((name for name in known if isinstance(row.get(name), list)), None)
        for known in (RANKINGS, _MANY_ANSWERS)
    )
    naming_many = naming("columns", {"completions": many or "your_column"})
    if ranking is not None:
        raise RowError(
            f"there is {ranking}, but no column 'completions' with the answers (found: {names}); "
            f"name it with {naming_many}"
        )
    if many is not None and not any(name in row for name in PAIRED.answers):
        raise RowError(
            f"there is neither a column {column!r} nor a column 'completions' (found: {names}); if "
            f"{many} has the answers to a prompt, name it with {naming_many}"
        )
    example = _likely_column(column, [str(name) for name in found]) or "your_column"
    raise RowError(
        f"there is no column {column!r} (found: {names}); name it with "
        f"{naming('columns', {column: example})} or add it"
    )


def _likely_column(column: str, found: Sequence[str]) -> str | None:
    """The column that probably holds these answers: not their rewards, models or lengths."""
    spelt = nearest_name(column, found)
    named = (
        name
        for name in found
        if column in (words := name.lower().split("_"))
        and _ANSWER_WORDS.issuperset({*words} - {column})
    )
    return spelt or next(named, None)
