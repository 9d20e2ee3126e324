"""The outcome of tokenising a row with many answers, and the report that sums up all outcomes.

A pair can be left out without the other pairs of its row, so an outcome has a reason for each pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpofast.columns import RANKED, TIES_COLUMN, RowKind
from dpofast.data.tokens.boundary import Ids, SplitRow
from dpofast.data.tokens.outcome import NOTES, OutcomeSums, places, problems
from dpofast.data.tokens.truncate import Cut

_NUMBER, _NUMBERS = datasets.Value("int32"), datasets.List(datasets.Value("int32"))


def ranked_features() -> dict[str, Any]:
    """Column of an outcome -> its type in `datasets`."""
    return {
        "prompt_ids": _NUMBERS,
        "completions_ids": datasets.List(_NUMBERS),  # of answers that are in a kept pair
        "completions": _NUMBERS,  # the places of these answers in the row of the source
        "pairs": datasets.List(_NUMBERS),  # kept pairs, as places in completions_ids
        "reasons": datasets.List(datasets.Value("string")),  # of each pair that is left out
        "problem": datasets.Value("string"),
        **dict.fromkeys(("prompt_length", "prompt_cut"), _NUMBER),
        "completion_lengths": _NUMBERS,  # of all answers, before the cut
        "completion_cuts": _NUMBERS,  # of the answers in completions_ids
        **dict.fromkeys(NOTES, datasets.Value("bool")),
    }


@dataclass(frozen=True, slots=True)
class RankedOutcome:
    """The outcome of one row's tokenisation.

    Attributes:
        split: token ids before the cut; None for a row without answers.
        cut: the cut of the row.
        pairs: the chosen and the rejected answer of each pair that is kept.
        reasons: for each other pair, why it is left out.
        places: the place of each answer of `split` in the row of the source.
        problem: place of a bad row, what is wrong with it, and what to do.
    """

    split: SplitRow | None
    cut: Cut
    pairs: Sequence[Sequence[int]]
    reasons: Sequence[str]
    places: Sequence[int] = ()
    problem: str | None = None

    def columns(self, kind: RowKind = RANKED) -> dict[str, Any]:
        """The outcome as columns `ranked_features()`."""
        split, cut = self.split or SplitRow([], ()), self.cut
        used = sorted({number for pair in self.pairs for number in pair})
        new_number = {number: index for index, number in enumerate(used)}
        prompt: Ids = []
        answers: tuple[Ids, ...] = ()
        if used:
            prompt, *all_answers = cut.apply(*split.ids)
            answers = tuple(all_answers[number] for number in used)
        return {
            "prompt_ids": prompt,
            "completions_ids": answers,
            "completions": [self.places[number] for number in used],
            "pairs": [[new_number[number] for number in pair] for pair in self.pairs],
            "reasons": self.reasons,
            "problem": self.problem,
            "prompt_length": len(split.prompt_ids),
            "prompt_cut": cut.prompt if used else 0,
            "completion_lengths": list(map(len, split.answers)),
            "completion_cuts": [cut.answers[number] for number in used],
            "merged": split.merged,
            "rerendered": split.rerendered,
        }


class RankedSums(OutcomeSums):
    """Adds up what became of the pairs of ranked rows. Prompts and answers count once each.

    Args:
        *tables: tables to begin with, as `add` takes them.
    """

    def __init__(self, *tables: pa.Table) -> None:
        self._ties = self._prompts = self._answers = 0
        super().__init__(*tables, kind=RANKED)

    def add(self, table: pa.Table) -> None:
        """Add rows.

        Args:
            table: columns `ranked_features()`, `row`, `ties` and, in mixtures, `source`.
        """
        kept, lost = (pc.list_value_length(table[name]).to_numpy() for name in ("pairs", "reasons"))
        self._read += int(kept.sum() + lost.sum())
        self._kept += int(kept.sum())
        self._ties += pc.sum(table[TIES_COLUMN]).as_py() or 0
        self._problems += problems(table)
        self._add_cuts(
            table["prompt_cut"].to_numpy(), pc.list_flatten(table["completion_cuts"]).to_numpy()
        )
        for name in NOTES:
            self._cuts[name] += int((kept + lost)[table[name].to_numpy()].sum())
        prompts = table["prompt_length"].to_numpy()
        counts = pc.list_value_length(table["completion_lengths"]).to_numpy()
        answers = pc.list_flatten(table["completion_lengths"]).to_numpy()
        has_ids = prompts > 0  # rows left out before they were tokenised have no lengths
        self._prompts += int(has_ids.sum())
        self._answers += len(answers)
        self._add_lengths(prompts[has_ids], answers, np.repeat(prompts, counts) + answers)
        rows = np.repeat(np.array(places(table), dtype=object), lost)
        self._add_left_out(pc.list_flatten(table["reasons"]).to_pylist(), rows.tolist())

    def _of_kind(self) -> dict[str, Any]:
        counts = {"prompts": self._prompts, "answers": self._answers}
        return {"ties": self._ties, "answers_read": counts}
