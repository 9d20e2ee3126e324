"""Which answers share a model call while reference log-probs are made.

Answers of one prompt are neighbours, so that a packed row has it once. Prompts whose longest answer
is long come first: little padding, and a model that runs out of memory does so at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from dpofast.reference.build.answers import PairAnswers

# Positions that the model's body runs over in a call with these (prompt ids, answer ids).
CountTokens = Callable[[Sequence[tuple[Sequence[int], Sequence[int]]]], int]
# Makes the batches of the answers wanted, [m] int64 of those in PairAnswers.
Batches = Callable[[PairAnswers, np.ndarray], "list[Batch]"]


@dataclass(frozen=True)
class Batch:
    """The answers of one model call.

    Attributes:
        answers: [m] int64, of those in PairAnswers, in the order in which the scorer gets them.
        num_tokens: what the call costs, for the progress bar.
    """

    answers: np.ndarray
    num_tokens: int


@dataclass(frozen=True)
class BatchesOfAnswers:
    """So many answers in each call.

    Attributes:
        num_answers: of a call, 1 or more.
        num_tokens: of a call, as the scorer lays it out.
    """

    num_answers: int
    num_tokens: CountTokens

    def __call__(self, answers: PairAnswers, wanted: np.ndarray) -> list[Batch]:
        order = list(chain.from_iterable(_by_prompt(answers, wanted)))
        parts = [
            order[start : start + self.num_answers]
            for start in range(0, len(order), self.num_answers)
        ]
        return [
            Batch(np.array(part), self.num_tokens([answers.ids(answer) for answer in part]))
            for part in parts
        ]


@dataclass(frozen=True)
class BatchesOfTokens:
    """As many prompts with all their answers as fit a packed row.

    A prompt whose answers don't fit one row is spread over several, and stands in each. An answer
    that is longer by itself has a call of its own.

    Attributes:
        max_tokens: of a row, 1 or more.
        num_tokens: of a row, as the scorer lays it out: what several prompts need adds up.
    """

    max_tokens: int
    num_tokens: CountTokens

    def __call__(self, answers: PairAnswers, wanted: np.ndarray) -> list[Batch]:
        batches: list[Batch] = []
        row: list[int] = []
        filled = 0
        for group in _by_prompt(answers, wanted):
            for number, (part, tokens) in enumerate(self._parts(answers, group)):
                # Parts of one prompt would be laid out as one, which may have more tokens: it
                # shares what all its answers begin with alone.
                if row and (number > 0 or filled + tokens > self.max_tokens):
                    batches.append(Batch(np.array(row), filled))
                    row, filled = [], 0
                row, filled = row + part, filled + tokens
        return [*batches, Batch(np.array(row), filled)] if row else batches

    def _parts(self, answers: PairAnswers, group: list[int]) -> Iterator[tuple[list[int], int]]:
        """The answers of one prompt, together where they fit a row, with their tokens there."""
        sequences = [answers.ids(answer) for answer in group]
        whole = self.num_tokens(sequences)
        if whole <= self.max_tokens:
            yield group, whole
            return
        start, tokens = 0, self.num_tokens(sequences[:1])
        for end in range(1, len(group)):
            longer = self.num_tokens(sequences[start : end + 1])
            if longer > self.max_tokens:
                yield group[start:end], tokens
                start, longer = end, self.num_tokens(sequences[end : end + 1])
            tokens = longer
        yield group[start:], tokens


def _by_prompt(answers: PairAnswers, wanted: np.ndarray) -> Iterator[list[int]]:
    """The answers wanted [m], one prompt after the other, the longest first."""
    lengths, prompts = answers.lengths(wanted), answers.prompts(wanted)
    longest = np.zeros(prompts.max(initial=-1) + 1, np.int64)
    np.maximum.at(longest, prompts, lengths)
    order = np.lexsort((-lengths, prompts, -longest[prompts]))
    starts = np.flatnonzero(np.diff(prompts[order], prepend=-1))
    for group in np.split(wanted[order], starts[1:]):
        if len(group):
            yield group.tolist()
