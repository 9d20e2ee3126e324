"""Reads unpaired rows: one prompt, one answer, and whether the answer is desirable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dpofast.columns import LABEL_COLUMN, UNPAIRED, WEIGHT_COLUMNS
from dpofast.data.reading.formats import read_form, with_template_options
from dpofast.data.reading.kinds import LABELS, wrong_kind
from dpofast.data.reading.messages import speaker
from dpofast.data.reading.options import refuse_media
from dpofast.data.reading.pair import Pair, Row
from dpofast.data.reading.row_error import RowError, naming, shown
from dpofast.data.reading.tokenised import read_ids
from dpofast.data.reading.weights import pair_weights

_ANSWER = UNPAIRED.answers[0]
WEIGHT = WEIGHT_COLUMNS[0]
_WORDS = {"true": True, "1": True, "false": False, "0": False}


def read_unpaired(
    row: Mapping[str, Any], found: Sequence[str], roles: Mapping[str, str]
) -> list[Pair]:
    """Bring one row to the normal form of unpaired rows.

    Args:
        row: the row's columns, after renaming.
        found: names of all columns in the source, used in errors.
        roles: role in the source -> role that templates know; wins over the built-in mapping.
    Returns:
        One row.
    Raises:
        RowError: the row can't be used; says why and what to do.
    """
    refuse_media(row)
    if (problem := wrong_kind(row, UNPAIRED)) is not None:
        raise RowError(problem)
    label, label_columns = _read_label(row, found)
    read = _read_ids(row) or _read_written(row, found, roles)
    read.values[LABEL_COLUMN] = label
    # How probable it is that one answer is better than another is a property of pairs.
    read.values.update(pair_weights({WEIGHT: row.get(WEIGHT)}))
    return [replace(read, used=read.used | label_columns | {WEIGHT})]


def _read_ids(row: Mapping[str, Any]) -> Pair | None:
    """A row that is tokenised already; None for other rows."""
    columns = UNPAIRED.id_columns
    if any(row.get(column) is None for column in columns):
        return None
    values: dict[str, Any] = {column: read_ids(row[column], column) for column in columns}
    read = Pair("ids", "tokenised prompt_ids", values, frozenset(columns), UNPAIRED)
    return with_template_options(read, Row(row))


def _read_written(
    values: Mapping[str, Any], found: Sequence[str], roles: Mapping[str, str]
) -> Pair:
    row = _under_our_names(values, found)
    read = read_form(row, roles)
    column = row.name(_ANSWER)
    if column in ("messages", "conversations"):
        last = read.values[_ANSWER]
        if len(last) != 1 or speaker(last[0]) != "assistant":
            raise RowError(
                f"{column} ends with a message from {last[-1]['role']!r}; end it with the answer "
                "from the assistant that the label is about, or remove the row"
            )
    return with_template_options(read, row)


def _under_our_names(values: Mapping[str, Any], found: Sequence[str]) -> Row:
    """The row with its answer in `completion`, wherever the source has it."""
    if values.get(_ANSWER) is not None:
        return Row(values, kind=UNPAIRED)
    has_prompt = values.get("prompt") is not None
    for column in ("messages", "conversations"):
        # Beside an answer that is null, a conversation is only its prompt.
        if values.get(column) is not None and not has_prompt and _ANSWER not in values:
            return _renamed(values, column)
    if values.get("instruction") is not None and "output" in values:
        return _renamed(values, "output")
    if _ANSWER in values:
        return Row(values, kind=UNPAIRED)
    example = {_ANSWER: next((c for c in ("response", "output") if c in values), "your_column")}
    raise RowError(
        f"there is no column {_ANSWER!r} (found: {', '.join(map(str, found)) or 'none'}); name it "
        f"with {naming('columns', example)} or add it"
    )


def _renamed(values: Mapping[str, Any], column: str) -> Row:
    taken = {name: value for name, value in values.items() if name != column}
    taken[_ANSWER] = values[column]
    return Row(taken, {_ANSWER: column}, {_ANSWER: frozenset({column})}, UNPAIRED)


def _read_label(row: Mapping[str, Any], found: Sequence[str]) -> tuple[bool, frozenset[str]]:
    """Whether the answer is desirable, and the columns that say so."""
    given = {column: row[column] for column in LABELS if row.get(column) is not None}
    if not given:
        if any(column in row for column in LABELS):
            named = next(column for column in LABELS if column in row)
            raise RowError(f"{named} is null; say true or false, or remove the row")
        raise RowError(
            f"there is no column {LABEL_COLUMN!r} (found: {', '.join(map(str, found)) or 'none'}), "
            "which says whether the answer is desirable; name it with "
            f"{naming('columns', {LABEL_COLUMN: 'your_column'})} or add it"
        )
    labels = {column: _truth(value, column) for column, value in given.items()}
    if len(set(labels.values())) == 2:
        raise RowError(f"{' and '.join(labels)} contradict each other; keep one")
    return next(iter(labels.values())), frozenset(labels)


def _truth(value: Any, column: str) -> bool:
    """A label as a bool. CSV files and tables with gaps hold texts and numbers."""
    plain = value.item() if hasattr(value, "item") else value  # NumPy's bools and numbers
    if isinstance(plain, str):
        plain = _WORDS.get(plain.strip().lower())
    # Python takes True for 1.
    if isinstance(plain, bool | int | float) and plain in (0, 1):
        return bool(plain)
    raise RowError(
        f"{column} is {shown(value)}, expected true for a desirable answer or false for an "
        "undesirable one (1 and 0 are right, too)"
    )
