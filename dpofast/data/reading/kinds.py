"""Tells pairs, unpaired rows and ranked rows by their columns, and refuses a kind that is wrong."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dpofast.columns import ID_COLUMNS, LABEL_COLUMN, PAIRED, RANKED, UNPAIRED, RowKind
from dpofast.data.reading.answer_pairs import RANKINGS
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


# What errors call a row of a kind, and several.
_IS_ROW = {
    PAIRED.name: "the row is a pair",
    UNPAIRED.name: "the row is unpaired",
    RANKED.name: "the row has many answers (completions)",
}
_ARE_ROWS = {
    PAIRED.name: "pairs",
    UNPAIRED.name: "unpaired rows",
    RANKED.name: "rows with many answers (completions)",
}
_OF_RANKED = frozenset((*RANKED.answers, *RANKED.id_columns[1:]))


def kind_of_row(row: Mapping[str, Any]) -> RowKind | None:
    """Whether a row is a pair, unpaired or ranked, from its columns; None if they don't say.

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
    # A file of pairs can have `completions`, too, and a pair without any answer there.
    can_be_ranked = _OF_PAIRS.isdisjoint(row) or not {*RANKINGS}.isdisjoint(filled)
    if can_be_ranked and not _OF_RANKED.isdisjoint(filled):
        return RANKED
    if not _OF_PAIRS.isdisjoint(row):  # both answers are null, so they are empty
        return PAIRED
    if not _OF_RANKED.isdisjoint(row) and not {*RANKINGS}.isdisjoint(row):
        return RANKED
    return UNPAIRED if has_label and not _BESIDE_LABELS.isdisjoint(row) else None


def kind_of_rows(rows: Iterable[Mapping[str, Any]]) -> RowKind | None:
    """The kind of the first of these rows whose columns tell; None if none does."""
    return next(filter(None, map(kind_of_row, rows)), None)


def wrong_kind(row: Mapping[str, Any], wanted: RowKind, source: str | None = None) -> str | None:
    """What is wrong with a row of another kind, and what to do; None for a row that isn't.

    Args:
        row: columns of the row, under our names.
        wanted: the kind that is right.
        source: name of the source, if all its rows are meant.
    """
    found = kind_of_row(row)
    if found in (wanted, None):
        return None
    assert found is not None
    is_row = source is None
    what = _IS_ROW[found.name] if is_row else f"{source} holds {_ARE_ROWS[found.name]}"
    if found is UNPAIRED:
        label = next(name for name in LABELS if name in row)
        what += f"{',' if is_row else ', each'} with one answer and {label!r} (KTO)"
    return f"{what}, and {_ARE_ROWS[wanted.name]} are wanted{_remedy(found, wanted)}"


def _remedy(found: RowKind, wanted: RowKind) -> str:
    if wanted is UNPAIRED:
        each = ", each with one answer and a label (KTO); "
        if found is RANKED:
            return f"{each}write each answer as a row with completion and label"
        return f"{each}split_pairs of dpofast.data splits each pair into two rows"
    if found is UNPAIRED:
        return (
            "; train on unpaired rows with loss_type kto (KTOTrainer in Python), or join a good "
            "and a bad answer of the same prompt to one row with chosen and rejected"
        )
    return "; write all rows of a source in one way, or give the two kinds as two datasets"


def refuse_other_kind(records: Iterable[Record], wanted: RowKind, name: str) -> None:
    """Refuse a source whose first rows are all of another kind.

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
