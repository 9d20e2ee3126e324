"""The outcome of each pair's tokenisation, and the report that sums up all outcomes.

`Dataset.map` can only return columns. So the outcome of each pair is written as columns, and the
report is made from the table of all pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from dpofast.columns import ID_COLUMNS, PAIR_COLUMNS
from dpofast.data.reading.reasons import BAD_ROW
from dpofast.data.tokens.boundary import SplitPair
from dpofast.data.tokens.left_out import REASONS
from dpofast.data.tokens.report import Lengths, PreparationReport
from dpofast.data.tokens.truncate import Cut, LengthLimits

_LENGTH_COLUMNS = tuple(f"{part}_length" for part in PAIR_COLUMNS)  # tokens before the cut
_CUT_COLUMNS = tuple(f"{part}_cut" for part in PAIR_COLUMNS)  # tokens cut
_NUMBERS = {
    **dict.fromkeys((*_LENGTH_COLUMNS, *_CUT_COLUMNS), datasets.Value("int32")),
    **dict.fromkeys(("merged", "rerendered"), datasets.Value("bool")),
}
OUTCOME_FEATURES = {
    **dict.fromkeys(ID_COLUMNS, datasets.List(datasets.Value("int32"))),
    **dict.fromkeys(("reason", "problem"), datasets.Value("string")),
    **_NUMBERS,
}


@dataclass(frozen=True, slots=True)
class PairOutcome:
    """The outcome of one pair's tokenisation.

    Attributes:
        split: token ids before the cut; None for a row without a pair.
        cut: the cut that the pair gets if it is kept.
        reason: why the pair is left out, one of REASONS; None if it is kept.
        problem: place of a bad row, what is wrong with it, and what to do.
    """

    split: SplitPair | None
    cut: Cut
    reason: str | None
    problem: str | None = None

    def columns(self) -> dict[str, Any]:
        """The outcome as columns OUTCOME_FEATURES; a pair that is left out has no ids."""
        kept = self.reason is None and self.split is not None
        split = self.split or SplitPair([], [], [])
        cut = self.cut if kept else Cut()
        ids = cut.apply(*split.ids) if kept else ([], [], [])
        cuts = (cut.prompt, cut.chosen, cut.rejected)
        return {
            **dict(zip(ID_COLUMNS, ids, strict=True)),
            "reason": self.reason,
            "problem": self.problem,
            **dict(zip(_LENGTH_COLUMNS, split.lengths, strict=True)),
            **dict(zip(_CUT_COLUMNS, cuts, strict=True)),
            "merged": split.merged,
            "rerendered": split.rerendered,
        }


def bad_row(problem: str) -> PairOutcome:
    """The outcome of a row that can't be used.

    Args:
        problem: place of the row, what is wrong with it, and what to do.
    """
    return PairOutcome(None, Cut(), BAD_ROW, problem)


def is_kept(table: pa.Table) -> np.ndarray:
    """Tell which pairs in a table of outcomes are kept: [n] bool."""
    kept: np.ndarray = table["reason"].is_null().to_numpy()
    return kept


def problems(table: pa.Table) -> list[str]:
    """The problem of each row that can't be used."""
    found: list[str] = table["problem"].drop_null().to_pylist()
    return found


class OutcomeSums:
    """Adds up what became of the pairs of one dataset, table by table.

    Args:
        *tables: tables to begin with, as `add` takes them.
    """

    def __init__(self, *tables: pa.Table) -> None:
        self._read = self._kept = 0
        self._cuts = Counter[str]()
        self._left_out: dict[str, list[int | str]] = {reason: [] for reason in REASONS}
        self._problems: list[str] = []
        self._lengths = {part: Counter[int]() for part in ("prompt", "answer", "sequence")}
        for table in tables:
            self.add(table)

    def add(self, table: pa.Table) -> None:
        """Add pairs.

        Args:
            table: columns OUTCOME_FEATURES, `row` and, in mixtures, `source`; one row per pair.
        """
        self._read += len(table)
        self._kept += int(is_kept(table).sum())
        self._problems += problems(table)
        columns = {name: table[name].to_numpy() for name in _NUMBERS}
        prompt_cut, chosen_cut, rejected_cut = (columns[name] for name in _CUT_COLUMNS)
        answer_cuts = np.concatenate([chosen_cut, rejected_cut])
        self._cuts["tokens"] += int(prompt_cut.sum() + answer_cuts.sum())
        self._cuts["answers"] += int(np.sum(answer_cuts > 0))
        self._cuts["prompts"] += int(np.sum(prompt_cut > 0))
        for name in ("merged", "rerendered"):
            self._cuts[name] += int(columns[name].sum())
        prompt, chosen, rejected = (columns[name] for name in _LENGTH_COLUMNS)
        is_pair = prompt > 0  # rows that were left out before they were tokenised have no lengths
        prompt, chosen, rejected = prompt[is_pair], chosen[is_pair], rejected[is_pair]
        answers = np.concatenate([chosen, rejected])
        sequences = np.concatenate([prompt, prompt]) + answers
        for count, lengths in zip(
            self._lengths.values(), (prompt, answers, sequences), strict=True
        ):
            count.update(lengths.tolist())
        for reason, rows in _left_out(table).items():
            self._left_out[reason] += rows

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
            unused: what the pairs' source has but training doesn't use.
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
        )


def _left_out(table: pa.Table) -> dict[str, tuple[int | str, ...]]:
    """Reason -> rows left out for it."""
    reasons = np.array(table["reason"].to_pylist(), dtype=object)
    rows = table["row"].to_pylist()
    if "source" in table.column_names:
        sources = table["source"].to_pylist()
        pairs = zip(sources, rows, strict=True)
        rows = [row if source is None else f"{source} row {row}" for source, row in pairs]
    found = {reason: np.flatnonzero(reasons == reason) for reason in REASONS}
    return {reason: tuple(rows[i] for i in at) for reason, at in found.items() if at.size}
