"""Reads rows of plain text."""

from __future__ import annotations

from dpofast.data.reading.conversation import has_system
from dpofast.data.reading.implicit import split_texts
from dpofast.data.reading.pair import Pair, Row
from dpofast.data.reading.row_error import RowError, naming, shown, text_of

# Columns that are prompts if answers have none. A few common words at the beginning of both answers
# would otherwise be taken for the prompt.
_QUESTIONS = ("input", "question", "query")
_NEAR = 60  # characters before a system message in which a template may announce it


def read_text(row: Row) -> Pair:
    """The row whose prompt and answers are texts, under a `system` text if it has one.

    Raises:
        RowError: one of them isn't text.
    """
    prompt = text_of(row.get("prompt"), "prompt")
    return _pair(row, row.kind.columns, prompt, *_answers(row))


def read_implicit_text(row: Row) -> Pair:
    """The pair of a row without a prompt column, whose answers are texts that begin with it.

    Raises:
        RowError: no prompt can be found, or another column has a question that isn't in it.
    """
    chosen, rejected = _answers(row)
    prompt = ""
    if chosen.strip() and rejected.strip():  # a pair with an empty answer is left out later
        prompt, chosen, rejected = split_texts(chosen, rejected)
        for column in _QUESTIONS:
            given = row.get(column)
            if isinstance(given, str) and given.strip() not in prompt:
                raise RowError(
                    f"{column} is {shown(given)}, which neither answer begins with; if it is the "
                    f"prompt, say {naming('columns', {'prompt': column})}, otherwise remove it"
                )
    return _pair(row, ("chosen", "rejected", *_QUESTIONS), prompt, chosen, rejected)


def _answers(row: Row) -> list[str]:
    return [text_of(row.get(column), row.name(column)) for column in row.answers]


def _pair(row: Row, read: tuple[str, ...], prompt: str, *answers: str) -> Pair:
    system = row.get("system")
    if has_system(system) and not _begins_with(prompt, system):
        prompt = f"{system}\n\n{prompt}"
    columns = row.listed(*(column for column in read if column not in _QUESTIONS))
    values = {"prompt": prompt, **dict(zip(row.answers, answers, strict=True))}
    return Pair("text", columns, values, row.used(*read, "system"), row.kind)


def _begins_with(prompt: str, system: str) -> bool:
    """Whether a prompt has this system message already, first or after a template's mark."""
    before, found, _ = prompt.partition(system.strip())
    return bool(found) and (not before.strip() or "sys" in before[-_NEAR:].lower())
