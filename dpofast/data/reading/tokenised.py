"""Reads pairs that are token ids already."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpofast.columns import ID_COLUMNS
from dpofast.data.reading.pair import Pair
from dpofast.data.reading.row_error import RowError, shown

# Names of the ids in TRL before 1.0 and in tools that follow it.
OLD_ID_COLUMNS = ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids")
# Columns that came with those ids. They say nothing new, so they are only checked.
MASK_COLUMNS = ("prompt_attention_mask", "chosen_attention_mask", "rejected_attention_mask")
LABEL_COLUMNS = ("chosen_labels", "rejected_labels")

_IGNORED = -100  # label of a token that isn't scored


def read_tokenised(row: Mapping[str, Any]) -> Pair | None:
    """The pair of a tokenised row, or None if the row isn't tokenised.

    Raises:
        RowError: the ids, masks or labels can't be used.
    """
    row = _without_nulls(row)
    if all(row.get(column) is not None for column in ID_COLUMNS):
        values = {column: read_ids(row[column], column) for column in ID_COLUMNS}
        return Pair("ids", "tokenised prompt_ids", values, frozenset(ID_COLUMNS))
    if any(row.get(column) is None for column in OLD_ID_COLUMNS):
        _require_all(row)
        return None
    prompt, *answers = (read_ids(row[column], column) for column in OLD_ID_COLUMNS)
    for ids, column, mask in zip((prompt, *answers), OLD_ID_COLUMNS, MASK_COLUMNS, strict=True):
        _check_mask(row.get(mask), mask, ids, column)
    labels = [row.get(column) for column in LABEL_COLUMNS]
    if all(value is not None for value in labels):
        for i, (value, name) in enumerate(zip(labels, LABEL_COLUMNS, strict=True)):
            answers[i] = _scored(prompt, answers[i], _integers(value, name), name)
    elif any(value is not None for value in labels):
        raise RowError(f"there is only one of {' and '.join(LABEL_COLUMNS)}; give both or neither")
    elif all(answer[: len(prompt)] == prompt for answer in answers):
        raise RowError(
            "chosen_input_ids and rejected_input_ids both begin with all of prompt_input_ids, and "
            "nothing says whether they repeat the prompt; remove it from them, or give the labels, "
            "too (chosen_labels, rejected_labels)"
        )
    used = frozenset((*OLD_ID_COLUMNS, *MASK_COLUMNS, *LABEL_COLUMNS))
    values = dict(zip(ID_COLUMNS, (prompt, *answers), strict=True))
    return Pair("ids", "tokenised prompt_input_ids", values, used)


def _without_nulls(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with [] as an answer that is null beside one that isn't: it is an empty answer."""
    for prompt, *answers in (ID_COLUMNS, OLD_ID_COLUMNS):
        given = [row.get(column) for column in answers]
        there = row.get(prompt) is not None and all(column in row for column in answers)
        if there and any(ids is not None for ids in given):
            empty: dict[str, list[int]] = {
                c: [] for c, ids in zip(answers, given, strict=True) if ids is None
            }
            return {**row, **empty} if empty else row
    return row


def _require_all(row: Mapping[str, Any]) -> None:
    """Refuse a row with some of the columns of ids and nothing else to read."""
    if row.get("chosen") is not None or row.get("rejected") is not None:
        return
    for columns in (ID_COLUMNS, OLD_ID_COLUMNS):
        missing = [column for column in columns if row.get(column) is None]
        if any(column not in missing for column in columns[1:]) and missing:
            raise RowError(
                f"a tokenised row needs {', '.join(columns)}, and has no {', '.join(missing)}"
            )


def read_ids(value: Any, column: str) -> list[int]:
    """The token ids in a column of a row.

    Raises:
        RowError: they can't be used.
    """
    ids = value.tolist() if hasattr(value, "tolist") else value  # an array or a tensor
    if not isinstance(ids, list | tuple):
        raise RowError(f"{column} is not a list of token ids but {shown(value)}")
    if not ids and column.startswith("prompt"):
        raise RowError(f"{column} is empty; give it at least one token or remove the row")
    for token in ids:  # ids are stored as int32; True is an int, but no id
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < 2**31:
            raise RowError(f"{column} holds {shown(token)}, which is not a token id")
    return list(ids)


def _integers(value: Any, column: str) -> list[int]:
    numbers = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(numbers, list | tuple) or not all(isinstance(n, int) for n in numbers):
        raise RowError(f"{column} is not a list of integers but {shown(value)}")
    return list(numbers)


def _check_mask(value: Any, name: str, ids: list[int], column: str) -> None:
    if value is not None and _integers(value, name) != [1] * len(ids):
        raise RowError(
            f"{name} is not 1 for every token of {column}; store the ids without padding"
        )


def _scored(prompt: list[int], ids: list[int], labels: list[int], name: str) -> list[int]:
    """The tokens of an answer that its labels score, from ids that may repeat the prompt."""
    repeated = ids[: len(prompt)] == prompt
    answer = ids[len(prompt) :] if repeated else ids
    if labels != [_IGNORED] * (len(ids) - len(answer)) + answer:
        raise RowError(
            f"{name} doesn't score exactly the answer: expected the ids that follow the prompt, "
            f"and {_IGNORED} for the prompt if the ids repeat it"
        )
    return answer
