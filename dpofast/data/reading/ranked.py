"""Reads ranked rows: a prompt, any number of answers, and which of them are better than others."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from dpofast.columns import (
    PAIRED,
    PAIRS_COLUMN,
    PLACES_COLUMN,
    RANKED,
    REF_COLUMNS,
    TIES_COLUMN,
    WEIGHT_COLUMNS,
    RowKind,
)
from dpofast.data.reading.answer_pairs import (
    PREFERENCES,
    RANKINGS,
    AnswerPairs,
    IndexPairs,
    answer_pairs_of,
)
from dpofast.data.reading.formats import read_form, with_template_options
from dpofast.data.reading.kinds import wrong_kind
from dpofast.data.reading.messages import is_empty_answer
from dpofast.data.reading.options import refuse_media
from dpofast.data.reading.pair import Pair, Row
from dpofast.data.reading.row_error import RowError, shown
from dpofast.data.reading.tokenised import read_ids
from dpofast.data.reading.weights import pair_weights

_ANSWERS, (_PROMPT_IDS, _ANSWER_IDS) = RANKED.answers[0], RANKED.id_columns


@dataclass(frozen=True, slots=True)
class _RankedRow:
    """A row as it was read.

    Attributes:
        kind, columns, used: as in Pair.
        common: the columns that all pairs of the row share, the prompt among them.
        answers: the answers; None for one that is empty.
        places: the place of each answer in the source's list.
        names: the name of each answer in errors.
        compared: the pairs.
    """

    kind: str
    columns: str
    used: frozenset[str]
    common: dict[str, Any]
    answers: list[Any]
    places: Sequence[int]
    names: Sequence[str]
    compared: AnswerPairs


class RankedReader:
    """Brings ranked rows to the normal form.

    Args:
        answer_pairs: which pairs to make, one of ANSWER_PAIRS; None for those that rows give, or
            else all.
        again: the rows are in the normal form already, so their pairs are made.
        as_pairs: give each pair of answers as a pair, instead of one ranked row.

    Attributes:
        made: which pairs were made so far: those of ANSWER_PAIRS that occurred.
    """

    def __init__(self, answer_pairs: str | None, again: bool = False, as_pairs: bool = False):
        self.answer_pairs, self.again = answer_pairs, again
        self.made: dict[str, None] = {}
        self._finish: Callable[[_RankedRow], list[Pair]] = _as_pairs if as_pairs else _as_rows

    def __call__(
        self, row: Mapping[str, Any], found: Sequence[str], roles: Mapping[str, str]
    ) -> list[Pair]:
        """Bring one row to the normal form.

        Args:
            row: the row's columns, after renaming.
            found: names of all columns in the source; not used.
            roles: role in the source -> role that templates know; wins over the built-in mapping.
        Returns:
            The row, without the answers that are in no pair, and one that is blank for each pair
            with an empty answer; or the row's pairs.
        Raises:
            RowError: the row can't be used; says why and what to do.
        """
        refuse_media(row)
        if (problem := wrong_kind(row, RANKED)) is not None:
            raise RowError(problem)
        _refuse_logps(row)
        read = self._read(row, roles)
        if not self.again:
            self.made[read.compared.how] = None
        read.common.update(pair_weights(row))
        return self._finish(read)

    def _read(self, row: Mapping[str, Any], roles: Mapping[str, str]) -> _RankedRow:
        is_ids = all(row.get(column) is not None for column in (_PROMPT_IDS, _ANSWER_IDS))
        column = _ANSWER_IDS if is_ids else _ANSWERS
        given = _listed(row.get(column), column)
        _refuse_records(given, column)
        places = row[PLACES_COLUMN] if self.again else range(len(given))
        names = tuple(f"{column}[{place}]" for place in places)
        compared = self._compared(row, len(given))
        used = {column, *(() if self.again else (compared.column,)), *WEIGHT_COLUMNS}
        for name, answer in zip(names, given, strict=True):
            if answer is None:
                raise RowError(
                    f"{name} is null; give it a text, or remove the answer, from "
                    f"{compared.column} too"
                )
        if is_ids:
            prompt = read_ids(row[_PROMPT_IDS], _PROMPT_IDS)
            ids = [read_ids(*each) or None for each in zip(given, names, strict=True)]
            pair = Pair("ids", _ANSWER_IDS, {_PROMPT_IDS: prompt}, frozenset({_PROMPT_IDS}))
            pair = with_template_options(pair, Row(row))
            answers = ids
        else:
            pair, answers = _read_written(row, given, names, roles)
        columns = f"{pair.columns}, {compared.column}"
        return _RankedRow(
            *(pair.kind, columns, pair.used | used, pair.values),
            *(answers, places, names, compared),
        )

    def _compared(self, row: Mapping[str, Any], num_answers: int) -> AnswerPairs:
        """The pairs of a row."""
        values = {column: _from_json(row.get(column)) for column in RANKINGS if column in row}
        if not self.again:
            return answer_pairs_of(values, num_answers, self.answer_pairs)
        made = answer_pairs_of({PREFERENCES: row.get(PAIRS_COLUMN)}, num_answers, None)
        return replace(made, ties=row.get(TIES_COLUMN) or 0)


def _read_written(
    row: Mapping[str, Any], given: Sequence[Any], names: Sequence[str], roles: Mapping[str, str]
) -> tuple[Pair, list[Any]]:
    """The prompt of a row that isn't tokenised, and its answers; None for one that is empty."""
    # An empty answer says nothing about where a prompt ends, so the others are read without it.
    present = list(range(len(given)))
    while True:
        pair = _read_answers(row, [given[i] for i in present], [names[i] for i in present], roles)
        answers = [pair.values.pop(names[i]) for i in present]
        full = [i for i, each in zip(present, answers, strict=True) if not _is_empty(each)]
        if full == present or len(full) < 2:
            found = dict(zip(present, answers, strict=True))
            return pair, [found[i] if i in full else None for i in range(len(given))]
        present = full


def _read_answers(
    row: Mapping[str, Any], given: Sequence[Any], names: Sequence[str], roles: Mapping[str, str]
) -> Pair:
    """The prompt and these answers, each under its name."""
    values = {name: value for name, value in row.items() if name != _ANSWERS}
    values.update(zip(names, given, strict=True))
    sources = dict.fromkeys(names, frozenset({_ANSWERS}))
    one = Row(values, {}, sources, _kind_of_many(tuple(names)))
    return with_template_options(read_form(one, roles), one)


@functools.lru_cache
def _kind_of_many(names: tuple[str, ...]) -> RowKind:
    """A kind of row with this many answers, each in a column of its own."""
    return RowKind(RANKED.name, RANKED.noun, names)


def _as_rows(read: _RankedRow) -> list[Pair]:
    """The row in the normal form, and a blank one for each pair that has an empty answer."""
    kept, lost = _without_empty(read)
    used = sorted({number for pair in kept for number in pair})
    new_number = {number: index for index, number in enumerate(used)}
    prompt, answers = RANKED.id_columns if read.kind == "ids" else RANKED.columns
    ties = {TIES_COLUMN: read.compared.ties}
    rows = []
    if kept:
        values = {
            **read.common,
            answers: [read.answers[number] for number in used],
            PAIRS_COLUMN: [[new_number[chosen], new_number[rejected]] for chosen, rejected in kept],
            PLACES_COLUMN: [read.places[number] for number in used],
            **ties,
        }
        rows.append(Pair(read.kind, read.columns, values, read.used, RANKED))
    for pair in lost:
        name = next(read.names[place] for place in pair if read.answers[place] is None)
        values = {prompt: read.common[prompt], **({} if rows else ties)}
        rows.append(Pair(read.kind, read.columns, values, read.used, RANKED, empty=name))
    return rows


def _as_pairs(read: _RankedRow) -> list[Pair]:
    """The pairs of the row, those with an empty answer among them."""
    columns = PAIRED.id_columns if read.kind == "ids" else PAIRED.columns
    pairs = []
    for number, places in enumerate(read.compared.pairs):
        empty = next((read.names[place] for place in places if read.answers[place] is None), None)
        answers = (read.answers[place] for place in places)
        values = {**read.common, **dict(zip(columns[1:], answers, strict=True))}
        if number == 0:
            values[TIES_COLUMN] = read.compared.ties
        pairs.append(Pair(read.kind, read.columns, values, read.used, PAIRED, empty=empty))
    return pairs


def _without_empty(read: _RankedRow) -> tuple[IndexPairs, IndexPairs]:
    """The pairs of two answers that say something, and the others."""
    kept: IndexPairs = []
    lost: IndexPairs = []
    for pair in read.compared.pairs:
        is_lost = any(read.answers[place] is None for place in pair)
        (lost if is_lost else kept).append(pair)
    return kept, lost


def _is_empty(answer: Any) -> bool:
    return not answer.strip() if isinstance(answer, str) else is_empty_answer(answer)


def _listed(value: Any, column: str) -> list[Any]:
    """The answers of a row."""
    answers = _from_json(value)
    answers = answers.tolist() if hasattr(answers, "tolist") else answers
    if not isinstance(answers, list | tuple):
        found = "null" if value is None else shown(value)
        is_repr = isinstance(value, str) and value.lstrip().startswith("[")
        how = "as JSON, with texts in double quotes" if is_repr else "with one item for each answer"
        raise RowError(
            f"{column} is not a list of answers but {found}; write a list {how}, or remove the row"
        )
    return list(answers)


def _refuse_records(answers: Sequence[Any], column: str) -> None:
    """Refuse answers that have other things beside their text, such as their scores."""
    for index, answer in enumerate(answers):
        if isinstance(answer, Mapping) and answer and not {"role", "from"} & answer.keys():
            raise RowError(
                f"{column}[{index}] is an object with {', '.join(map(str, answer))}; write each "
                f"answer as a text in {column}, and what says which ones are better as a list in "
                "scores, ranks or preferences"
            )


def _from_json(value: Any) -> Any:
    """What a text holds as JSON, as CSV files have lists; any other value as it is."""
    if isinstance(value, str) and value.strip():
        with suppress(ValueError, RecursionError):  # refused later, because it is no list
            return json.loads(value)
    return value


def _refuse_logps(row: Mapping[str, Any]) -> None:
    given = [column for column in REF_COLUMNS if row.get(column) is not None]
    if given:
        raise RowError(
            f"the row has {' and '.join(given)}, which are of a pair, and it has many answers; "
            "remove the columns, and the run scores the answers itself, or write each pair as a "
            "row with chosen and rejected"
        )
