"""The report of a dataset's preparation, as text and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dpofast.columns import PAIRED, UNPAIRED
from dpofast.counted import counted
from dpofast.data.tokens.truncate import LengthLimits

PERCENTILES = (50, 90, 99)
_SHOWN_ROWS = 10  # rows that the text names for each reason; the JSON names all


@dataclass(frozen=True)
class Lengths:
    """Distribution of lengths in tokens before the cut.

    Attributes:
        longest: the greatest length.
        percentiles: percentile, one of PERCENTILES -> length.
    """

    longest: int
    percentiles: Mapping[int, int]

    @classmethod
    def of(cls, counts: Mapping[int, int]) -> Lengths:
        """Distribution of lengths; all zeros if there are none.

        Each percentile is a length that occurs, not an interpolation between two.

        Args:
            counts: length -> how often it occurs.
        """
        if not counts:
            return cls(0, dict.fromkeys(PERCENTILES, 0))
        lengths = sorted(counts)
        ends = np.cumsum([counts[length] for length in lengths])
        # Where a percentile falls between two lengths, the greater one is taken.
        places = np.ceil(np.array(PERCENTILES) / 100 * (ends[-1] - 1))
        at = np.searchsorted(ends, places, side="right")
        percentiles = {p: lengths[i] for p, i in zip(PERCENTILES, at, strict=True)}
        return cls(lengths[-1], percentiles)


@dataclass(frozen=True)
class PreparationReport:
    """Counts from the preparation of one dataset. Rows are counted from 0, as in the source.

    Attributes:
        name: dataset name, such as "train".
        pairs_read: pairs in the source; rows, if the data is unpaired.
        pairs_kept: pairs, or unpaired rows, that can be trained on.
        left_out: reason -> rows left out for it; holds only reasons that occurred. In a mixture of
            several sources, a row is named with its source, as text.
        problems: place of each row that was left out as a bad row, and what is wrong with it.
        unused: columns, and fields of messages, that the source has but that aren't trained on.
        nulls_left_out: whether fields that were null in structs of Arrow were left out.
        answers_cut: answers in kept pairs that were cut on their right.
        prompts_cut: prompts in kept pairs that were cut on their left.
        tokens_cut: tokens removed by these cuts; a prompt counts once, not per answer.
        boundary_merges: pairs in which the tokenizer would merge prompt and answer.
        rerendered_prompts: pairs whose prompt the chat template renders differently when no answer
            follows it.
        limits: the options that decided the cuts.
        prompt_lengths, answer_lengths, sequence_lengths: lengths in all pairs read, before the
            cut; a sequence is a prompt and one answer.
        labels: "desirable" and "undesirable" -> kept rows; None for pairs.
        ties: pairs of answers in ranked rows that equal scores leave unmade.
        answers_read: "prompts" and "answers" -> how many the pairs of ranked rows are made of,
            each counted once; None for other rows.
    """

    name: str
    pairs_read: int
    pairs_kept: int
    left_out: Mapping[str, tuple[int | str, ...]]
    problems: tuple[str, ...]
    unused: tuple[str, ...]
    nulls_left_out: bool
    answers_cut: int
    prompts_cut: int
    tokens_cut: int
    boundary_merges: int
    rerendered_prompts: int
    limits: LengthLimits
    prompt_lengths: Lengths
    answer_lengths: Lengths
    sequence_lengths: Lengths
    labels: Mapping[str, int] | None = None
    ties: int = 0
    answers_read: Mapping[str, int] | None = None

    @property
    def noun(self) -> str:
        """What the report calls a row."""
        return (PAIRED if self.labels is None else UNPAIRED).noun

    def lines(self) -> list[str]:
        """The report as text; leaves out what did not occur."""
        lines = [
            f"{self.name}: {counted(self.pairs_read, self.noun)} read, {self.pairs_kept:,} kept"
        ]
        if self.labels is not None:
            lines.append(
                "  labels: " + ", ".join(f"{n:,} {name}" for name, n in self.labels.items())
            )
        if self.answers_read is not None:
            counts = (counted(n, name[:-1]) for name, n in self.answers_read.items())
            lines.append(f"  made of {' with '.join(counts)}")
        if self.ties:
            not_made = "is" if self.ties == 1 else "are"
            lines.append(
                f"  {counted(self.ties, 'pair')} of answers {not_made} not made, as the scores are "
                "equal"
            )
        for reason, rows in self.left_out.items():
            named = list(dict.fromkeys(rows))  # several pairs can be of one row
            places = ", ".join(map(str, named[:_SHOWN_ROWS]))
            more = f", ... ({len(named) - _SHOWN_ROWS} more)" if len(named) > _SHOWN_ROWS else ""
            lines.append(f"  left out, {reason}: {len(rows)} (rows from 0: {places}{more})")
        lines += [f"    {problem}" for problem in self.problems[:_SHOWN_ROWS]]
        if self.unused:
            lines.append(f"  not used: {', '.join(self.unused)}")
        if self.nulls_left_out:
            lines.append(
                "  fields that are null in Arrow's structs were left out, as they can be other "
                "rows' fields; JSON lines keep nulls that are meant"
            )
        if self.answers_cut or self.prompts_cut:
            lines.append(
                f"  cut to {self.limits}: "
                f"{counted(self.prompts_cut, 'prompt')} and {counted(self.answers_cut, 'answer')}, "
                f"{counted(self.tokens_cut, 'token')} in all"
            )
        if self.boundary_merges:
            rows_merged = counted(self.boundary_merges, self.noun)
            lines.append(
                f"  the tokenizer merges prompt and answer in {rows_merged}; there the "
                "answer was tokenised by itself"
            )
        if self.rerendered_prompts:
            prompts = counted(self.rerendered_prompts, "prompt")
            lines.append(
                f"  the chat template renders {prompts} otherwise "
                "before an answer than alone; there the prompt ends where they part"
            )
        for part, lengths in self._all_lengths().items():
            percentiles = ", ".join(f"p{p} {value}" for p, value in lengths.percentiles.items())
            lines.append(f"  {part} tokens: {percentiles}, longest {lengths.longest}")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """The report as values that JSON can hold; each limit has a key of its own."""
        plain = {key: value for key, value in vars(self).items() if not key.endswith("_lengths")}
        plain |= asdict(plain.pop("limits"))
        if plain.pop("labels") is not None:
            plain["labels"] = dict(self.labels or {})
        if not self.ties:
            del plain["ties"]
        if plain.pop("answers_read") is not None:
            plain["answers_read"] = dict(self.answers_read or {})
        plain["left_out"] = {reason: list(rows) for reason, rows in self.left_out.items()}
        plain |= {"problems": list(self.problems), "unused": list(self.unused)}
        for part, lengths in self._all_lengths().items():
            percentiles = {f"p{p}": value for p, value in lengths.percentiles.items()}
            plain[f"{part}_lengths"] = {"longest": lengths.longest, **percentiles}
        return plain

    def _all_lengths(self) -> dict[str, Lengths]:
        return {
            "prompt": self.prompt_lengths,
            "answer": self.answer_lengths,
            "sequence": self.sequence_lengths,
        }
