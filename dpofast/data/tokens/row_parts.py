"""The prompt and the answers of a row in the normal form, whatever kind of row it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpofast.columns import PLACES_COLUMN, RowKind, kind_of_columns


def row_parts(row: Mapping[str, Any], kind: RowKind | None = None) -> list[Any]:
    """The prompt and each answer: texts, messages as JSON, or token ids.

    Args:
        row: the columns of a row that wasn't left out.
        kind: what it is; by default its columns say so.
    """
    kind = kind or kind_of_columns(row)
    is_tokenised = kind.id_columns[0] in row
    prompt, *answers = kind.id_columns if is_tokenised else kind.columns
    if kind.many:
        return [row[prompt], *row[answers[0]]]
    return [row[prompt], *(row[column] for column in answers)]


def part_names(row: Mapping[str, Any]) -> list[str]:
    """What errors call the prompt and each answer of a row of text or messages."""
    kind = kind_of_columns(row)
    if not kind.many:
        return list(kind.columns)
    prompt, answers = kind.columns
    return [prompt, *(f"{answers}[{place}]" for place in row[PLACES_COLUMN])]


def with_parts(row: Mapping[str, Any], parts: Sequence[Any]) -> dict[str, Any]:
    """The row with this prompt and these answers, texts or messages, in place of its own."""
    kind = kind_of_columns(row)
    prompt, *answers = parts
    values = [list(answers)] if kind.many else answers
    return {**row, **dict(zip(kind.columns, (prompt, *values), strict=True))}
