"""What became of the pairs of a dataset on their way to tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

PERCENTILES = (50, 90, 99)
_SHOWN_ROWS = 10

IDENTICAL = "identical answers"
NO_ROOM = "no room for an answer"
IDENTICAL_CUT = "identical answers after the cut"
REASONS = (IDENTICAL, NO_ROOM, IDENTICAL_CUT)


@dataclass(frozen=True)
class Lengths:
    """Distribution of lengths in tokens, before anything is cut."""

    longest: int
    percentiles: Mapping[int, int]

    @classmethod
    def of(cls, lengths: np.ndarray) -> Lengths:
        """Of at least one length [n]; a percentile is one of the lengths, never between two."""
        values = np.percentile(lengths, PERCENTILES, method="higher")
        percentiles = {p: int(v) for p, v in zip(PERCENTILES, values, strict=True)}
        return cls(int(lengths.max()), percentiles)


@dataclass(frozen=True)
class PreparationReport:
    """Counts of one dataset's preparation. Rows are counted from 0, as in the source.

    Attributes:
        name: the dataset's name, such as "train".
        pairs_read: pairs in the source.
        pairs_kept: pairs that can be trained on.
        left_out: reason -> rows of the pairs left out for it; only reasons that occurred.
        answers_cut: answers of kept pairs that were cut on their right.
        prompts_cut: prompts of kept pairs that were cut on their left.
        tokens_cut: tokens that these cuts took away, a prompt's counted once.
        boundary_merges: pairs in which the tokenizer would merge prompt and answer.
        rerendered_prompts: pairs whose chat template renders the prompt alone otherwise.
        max_length: the limit, None where there is none.
        truncation_mode: keep_start or keep_end.
        prompt_lengths, answer_lengths, sequence_lengths: over all pairs read, before the cut;
            a sequence is a prompt and one answer.
    """

    name: str
    pairs_read: int
    pairs_kept: int
    left_out: Mapping[str, tuple[int, ...]]
    answers_cut: int
    prompts_cut: int
    tokens_cut: int
    boundary_merges: int
    rerendered_prompts: int
    max_length: int | None
    truncation_mode: str
    prompt_lengths: Lengths
    answer_lengths: Lengths
    sequence_lengths: Lengths

    def lines(self) -> list[str]:
        """The report for people; what did not occur is not mentioned."""
        lines = [f"{self.name}: {_count(self.pairs_read, 'pair')} read, {self.pairs_kept} kept"]
        for reason, rows in self.left_out.items():
            places = ", ".join(map(str, rows[:_SHOWN_ROWS]))
            more = f", ... ({len(rows) - _SHOWN_ROWS} more)" if len(rows) > _SHOWN_ROWS else ""
            lines.append(f"  left out, {reason}: {len(rows)} (rows from 0: {places}{more})")
        if self.answers_cut or self.prompts_cut:
            lines.append(
                f"  cut to max_length {self.max_length} ({self.truncation_mode}): "
                f"{_count(self.prompts_cut, 'prompt')} and {_count(self.answers_cut, 'answer')}, "
                f"{_count(self.tokens_cut, 'token')} in all"
            )
        if self.boundary_merges:
            pairs = _count(self.boundary_merges, "pair")
            lines.append(
                f"  the tokenizer merges prompt and answer in {pairs}; there the "
                "answer was tokenised by itself"
            )
        if self.rerendered_prompts:
            prompts = _count(self.rerendered_prompts, "prompt")
            lines.append(
                f"  the chat template renders {prompts} otherwise "
                "before an answer than alone; there the prompt ends where they part"
            )
        for what in ("prompt", "answer", "sequence"):
            lengths: Lengths = getattr(self, f"{what}_lengths")
            shares = ", ".join(f"p{p} {value}" for p, value in lengths.percentiles.items())
            lines.append(f"  {what} tokens: {shares}, longest {lengths.longest}")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        plain = {key: value for key, value in vars(self).items() if not key.endswith("_lengths")}
        plain["left_out"] = {reason: list(rows) for reason, rows in self.left_out.items()}
        for what in ("prompt", "answer", "sequence"):
            lengths: Lengths = getattr(self, f"{what}_lengths")
            shares = {f"p{p}": value for p, value in lengths.percentiles.items()}
            plain[f"{what}_lengths"] = {"longest": lengths.longest, **shares}
        return plain


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
