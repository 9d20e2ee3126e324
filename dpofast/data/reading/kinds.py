"""Tells pairs from unpaired rows by their columns, and refuses one kind where another is wanted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dpofast.columns import ID_COLUMNS, LABEL_COLUMN, PAIRED, UNPAIRED, RowKind
from dpofast.data.reading.other_names import OTHER_COLUMNS
from dpofast.data.reading.records import Record
from dpofast.data.reading.tokenised import OLD_ID_COLUMNS
from dpofast.errors import DataError

# Columns that say whether an answer is desirable: TRL's, and LLaMA-Factory's.
LABELS = (LABEL_COLUMN, "kto_tag")
_OF_PAIRS = frozenset(
    (
        *PAIRED.answers,
        *OTHER_COLUMNS,
        *("rejected_messages", "rejected_response"),
        *(*ID_COLUMNS[1:], *OLD_ID_COLUMNS[1:]),
    )
)
_BESIDE_LABELS = frozenset(
    (
        *(*UNPAIRED.columns, *UNPAIRED.id_columns),
        *("messages", "conversations", "instruction", "output"),
    )
)


def kind_of_row(row: Mapping[str, Any]) -> RowKind | None:
    """Whether a row is a pair or unpaired, from its columns; None if they don't say.

    Arrow gives a row the columns of all rows, so columns that hold something come first.
    """
    if row.get(PAIRED.answers[0]) is not None:  # nearly all pairs, at once
        return PAIRED
    filled = [name for name, value in row.items() if value is not None]
    has_label = any(label in row for label in LABELS)
    if not _OF_PAIRS.isdisjoint(filled):
        return PAIRED
    if has_label and UNPAIRED.answers[0] in filled:
        return UNPAIRED
    if not _OF_PAIRS.isdisjoint(row):  # both answers are null, so they are empty
        return PAIRED
    return UNPAIRED if has_label and not _BESIDE_LABELS.isdisjoint(row) else None


def wrong_kind(row: Mapping[str, Any], wanted: RowKind, source: str | None = None) -> str | None:
    """What is wrong with a row of the other kind, and what to do; None for a row that isn't.

    Args:
        row: columns of the row, under our names.
        wanted: the kind that is right.
        source: name of the source, if all its rows are meant.
    """
    if kind_of_row(row) in (wanted, None):
        return None
    if wanted is UNPAIRED:
        what = "the row is a pair" if source is None else f"{source} holds pairs"
        return (
            f"{what}, and unpaired rows are wanted, each with one answer and a label (KTO); "
            "split_pairs of dpofast.data splits each pair into two rows"
        )
    label = next(name for name in LABELS if name in row)
    what = "the row is unpaired," if source is None else f"{source} holds unpaired rows, each"
    return (
        f"{what} with one answer and {label!r} (KTO), and pairs are wanted; train on unpaired rows "
        "with loss_type kto (KTOTrainer in Python), or join a good and a bad answer of the same "
        "prompt to one row with chosen and rejected"
    )


def refuse_other_kind(records: Iterable[Record], wanted: RowKind, name: str) -> None:
    """Refuse a source whose first rows are all of the other kind.

    Args:
        records: the first rows, with columns under our names.
        wanted: the kind that is right.
        name: name of the source.

    Raises:
        DataError: they are; says what to do.
    """
    problem = None
    for record in records:
        if record.problem:
            continue
        found = wrong_kind(record.values, wanted, name)
        if found is None:
            return
        problem = problem or found
    if problem is not None:
        raise DataError(problem)
