"""The outcome of each row's tokenisation, and the report that sums up all outcomes.

`Dataset.map` can only return columns. So the outcome of each row is written as columns, and the
report is made from the table of all rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import datasets
import numpy as np
import pyarrow as pa

from dpofast.columns import LABEL_COLUMN, PAIRED, RowKind
from dpofast.data.reading.reasons import BAD_ROW
from dpofast.data.tokens.boundary import SplitRow
from dpofast.data.tokens.left_out import REASONS
from dpofast.data.tokens.report import Lengths, PreparationReport
from dpofast.data.tokens.truncate import Cut, LengthLimits

NOTES = ("merged", "rerendered")


def outcome_features(kind: RowKind) -> dict[str, Any]:
    """Column of an outcome -> its type in `datasets`."""
    return {
        **dict.fromkeys(kind.id_columns, datasets.List(datasets.Value("int32"))),
        **dict.fromkeys(("reason", "problem"), datasets.Value("string")),
        **dict.fromkeys((*_length_columns(kind), *_cut_columns(kind)), datasets.Value("int32")),
        **dict.fromkeys(NOTES, datasets.Value("bool")),
    }


def _length_columns(kind: RowKind) -> list[str]:
    """Columns with the tokens of each part before the cut."""
    return [f"{part}_length" for part in kind.columns]


def _cut_columns(kind: RowKind) -> list[str]:
    """Columns with the tokens that are cut from each part."""
    return [f"{part}_cut" for part in kind.columns]


class Outcome(Protocol):
    """The outcome of one row's tokenisation."""

    def columns(self, kind: RowKind) -> dict[str, Any]:
        """The outcome as columns of a table."""


@dataclass(frozen=True, slots=True)
class RowOutcome:
    """The outcome of one row's tokenisation.

    Attributes:
        split: token ids before the cut; None for a row without answers.
        cut: the cut that the row gets if it is kept; None if it is known to be left out.
        reason: why the row is left out, one of REASONS; None if it is kept.
        problem: place of a bad row, what is wrong with it, and what to do.
    """

    split: SplitRow | None
    cut: Cut | None
    reason: str | None
    problem: str | None = None

    def columns(self, kind: RowKind) -> dict[str, Any]:
        """The outcome as columns `outcome_features(kind)`; a row that is left out has no ids."""
        num_answers = len(kind.answers)
        split = self.split or SplitRow([], ([],) * num_answers)
        ids: tuple[list[int], ...] = ([],) * (1 + num_answers)
        cut = Cut.nothing(num_answers)
        if self.reason is None and self.cut is not None:
            cut = self.cut
            ids = cut.apply(*split.ids)
        return {
            **dict(zip(kind.id_columns, ids, strict=True)),
            "reason": self.reason,
            "problem": self.problem,
            **dict(zip(_length_columns(kind), split.lengths, strict=True)),
            **dict(zip(_cut_columns(kind), (cut.prompt, *cut.answers), strict=True)),
            "merged": split.merged,
            "rerendered": split.rerendered,
        }


def bad_row(problem: str) -> RowOutcome:
    """The outcome of a row that can't be used.

    Args:
        problem: place of the row, what is wrong with it, and what to do.
    """
    return RowOutcome(None, None, BAD_ROW, problem)


def is_kept(table: pa.Table) -> np.ndarray:
    """Tell which rows in a table of outcomes are kept: [n] bool."""
    kept: np.ndarray = table["reason"].is_null().to_numpy()
    return kept


def problems(table: pa.Table) -> list[str]:
    """The problem of each row that can't be used."""
    found: list[str] = table["problem"].drop_null().to_pylist()
    return found


class OutcomeSums:
    """Adds up what became of the rows of one dataset, table by table.

    Args:
        *tables: tables to begin with, as `add` takes them.
        kind: what the rows are.
    """

    def __init__(self, *tables: pa.Table, kind: RowKind = PAIRED) -> None:
        self._kind = kind
        self._read = self._kept = self._desirable = 0
        self._cuts = Counter[str]()
        self._left_out: dict[str, list[int | str]] = {reason: [] for reason in REASONS}
        self._problems: list[str] = []
        self._lengths = {part: Counter[int]() for part in ("prompt", "answer", "sequence")}
        for table in tables:
            self.add(table)

    def add(self, table: pa.Table) -> None:
        """Add rows.

        Args:
            table: columns `outcome_features(kind)`, `row` and, in mixtures, `source`; with the
                label, if rows have one.
        """
        self._read += len(table)
        kept = is_kept(table)
        self._kept += int(kept.sum())
        if self._kind.labelled:
            self._desirable += sum(table[LABEL_COLUMN].filter(kept).to_pylist())
        self._problems += problems(table)
        prompt_cut, *cuts = (table[name].to_numpy() for name in _cut_columns(self._kind))
        self._add_cuts(prompt_cut, np.concatenate(cuts))
        for name in NOTES:
            self._cuts[name] += int(table[name].to_numpy().sum())
        lengths_of = [table[name].to_numpy() for name in _length_columns(self._kind)]
        has_ids = lengths_of[0] > 0  # rows left out before they were tokenised have no lengths
        prompt, *each = (lengths[has_ids] for lengths in lengths_of)
        answers = np.concatenate(each)
        self._add_lengths(prompt, answers, np.concatenate([prompt] * len(each)) + answers)
        self._add_left_out(table["reason"].to_pylist(), places(table))

    def _add_cuts(self, prompts: np.ndarray, answers: np.ndarray) -> None:
        """Add the tokens that prompts and answers lose."""
        self._cuts["tokens"] += int(prompts.sum() + answers.sum())
        self._cuts["answers"] += int(np.sum(answers > 0))
        self._cuts["prompts"] += int(np.sum(prompts > 0))

    def _add_lengths(self, *lengths: np.ndarray) -> None:
        """Add the tokens of prompts, of answers, and of prompts with an answer, before the cut."""
        for count, of_part in zip(self._lengths.values(), lengths, strict=True):
            count.update(of_part.tolist())

    def _add_left_out(self, reasons: Sequence[str | None], rows: Sequence[int | str]) -> None:
        """Add the reason of each row; None for rows that are kept."""
        for reason, row in zip(reasons, rows, strict=True):
            if reason is not None:
                self._left_out[reason].append(row)

    def report(
        self,
        name: str,
        limits: LengthLimits,
        unused: Sequence[str] = (),
        nulls_left_out: bool = False,
    ) -> PreparationReport:
        """Sum up a dataset's preparation.

        Args:
            name: dataset name.
            limits: the options that decided the cuts.
            unused: what the rows' source has but training doesn't use.
            nulls_left_out: whether nulls in structs of Arrow were left out.
        """
        prompt, answer, sequence = map(Lengths.of, self._lengths.values())
        return PreparationReport(
            name=name,
            pairs_read=self._read,
            pairs_kept=self._kept,
            left_out={reason: tuple(rows) for reason, rows in self._left_out.items() if rows},
            problems=tuple(self._problems),
            unused=tuple(unused),
            nulls_left_out=nulls_left_out,
            answers_cut=self._cuts["answers"],
            prompts_cut=self._cuts["prompts"],
            tokens_cut=self._cuts["tokens"],
            boundary_merges=self._cuts["merged"],
            rerendered_prompts=self._cuts["rerendered"],
            limits=limits,
            prompt_lengths=prompt,
            answer_lengths=answer,
            sequence_lengths=sequence,
            **self._of_kind(),
        )

    def _of_kind(self) -> dict[str, Any]:
        """The fields of a report that only this kind of rows has."""
        if not self._kind.labelled:
            return {}
        labels = {"desirable": self._desirable, "undesirable": self._kept - self._desirable}
        return {"labels": labels}


def places(table: pa.Table) -> list[int | str]:
    """What a report calls each row of a table of outcomes: its number; with its source, if any."""
    rows: list[int | str] = table["row"].to_pylist()
    if "source" not in table.column_names:
        return rows
    named = zip(table["source"].to_pylist(), rows, strict=True)
    return [row if source is None else f"{source} row {row}" for source, row in named]
