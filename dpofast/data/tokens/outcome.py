"""The outcome of each pair's tokenisation, and the report that sums up all outcomes.

`Dataset.map` can only return columns. So the outcome of each pair is written as columns, and the
report is made from the table of all pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from dpofast.columns import ID_COLUMNS, PAIR_COLUMNS
from dpofast.data.tokens.boundary import SplitPair
from dpofast.data.tokens.left_out import REASONS
from dpofast.data.tokens.report import Lengths, PreparationReport
from dpofast.data.tokens.truncate import Cut

_KEPT = 0  # column `reason` of a kept pair; a pair that is left out has 1 + its index in REASONS
_LENGTH_COLUMNS = tuple(f"{part}_length" for part in PAIR_COLUMNS)  # tokens before the cut
_CUT_COLUMNS = tuple(f"{part}_cut" for part in PAIR_COLUMNS)  # tokens cut
_NUMBERS = {
    "reason": datasets.Value("int8"),
    **dict.fromkeys((*_LENGTH_COLUMNS, *_CUT_COLUMNS), datasets.Value("int32")),
    **dict.fromkeys(("merged", "rerendered"), datasets.Value("bool")),
}
OUTCOME_FEATURES = {
    **dict.fromkeys(ID_COLUMNS, datasets.List(datasets.Value("int32"))),
    **_NUMBERS,
}


@dataclass(frozen=True, slots=True)
class PairOutcome:
    """The outcome of one pair's tokenisation.

    Attributes:
        split: token ids before the cut.
        cut: the cut that the pair gets if it is kept.
        reason: why the pair is left out, one of REASONS; None if it is kept.
    """

    split: SplitPair
    cut: Cut
    reason: str | None

    def columns(self) -> dict[str, Any]:
        """The outcome as columns OUTCOME_FEATURES; a pair that is left out has no ids."""
        if self.reason is None:
            code, cut = _KEPT, self.cut
            ids = cut.apply(*self.split.ids)
        else:
            code, cut = 1 + REASONS.index(self.reason), Cut()
            ids = ([], [], [])
        cuts = (cut.prompt, cut.chosen, cut.rejected)
        return {
            **dict(zip(ID_COLUMNS, ids, strict=True)),
            "reason": code,
            **dict(zip(_LENGTH_COLUMNS, self.split.lengths, strict=True)),
            **dict(zip(_CUT_COLUMNS, cuts, strict=True)),
            "merged": self.split.merged,
            "rerendered": self.split.rerendered,
        }


def is_kept(table: pa.Table) -> np.ndarray:
    """Tell which pairs in a table of outcomes are kept: [n] bool."""
    kept: np.ndarray = table["reason"].to_numpy() == _KEPT
    return kept


def make_report(
    table: pa.Table, name: str, max_length: int | None, truncation_mode: str
) -> PreparationReport:
    """Sum up a dataset's preparation.

    Args:
        table: columns OUTCOME_FEATURES and `row`, one row per pair that was read.
        name: dataset name.
        max_length, truncation_mode: the options that decided the cuts.
    """
    columns = {name: table[name].to_numpy() for name in _NUMBERS}
    rows = table["row"].to_numpy()
    left_out = {
        reason: tuple(rows[columns["reason"] == code].tolist())
        for code, reason in enumerate(REASONS, start=1)
        if np.any(columns["reason"] == code)
    }
    prompt, chosen, rejected = (columns[name] for name in _LENGTH_COLUMNS)
    prompt_cut, chosen_cut, rejected_cut = (columns[name] for name in _CUT_COLUMNS)
    answers = np.concatenate([chosen, rejected])
    answer_cuts = np.concatenate([chosen_cut, rejected_cut])
    return PreparationReport(
        name=name,
        pairs_read=len(rows),
        pairs_kept=int(is_kept(table).sum()),
        left_out=left_out,
        answers_cut=int(np.sum(answer_cuts > 0)),
        prompts_cut=int(np.sum(prompt_cut > 0)),
        tokens_cut=int(prompt_cut.sum() + answer_cuts.sum()),
        boundary_merges=int(columns["merged"].sum()),
        rerendered_prompts=int(columns["rerendered"].sum()),
        max_length=max_length,
        truncation_mode=truncation_mode,
        prompt_lengths=Lengths.of(prompt),
        answer_lengths=Lengths.of(answers),
        sequence_lengths=Lengths.of(np.concatenate([prompt, prompt]) + answers),
    )
