"""Decides which answers share a model call while reference log-probs are built.

Answers of one prompt are neighbours, so a packed call can share the prompt between them. Prompts
with the longest sequences come first. Neighbours then need little padding, and a model that runs
out of memory does so in the first call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from dpofast.reference.build.answers import PairAnswers

# Counts the positions that the model's body computes in a call with these (prompt ids, answer ids).
CountTokens = Callable[[Sequence[tuple[Sequence[int], Sequence[int]]]], int]
# Divides the wanted answers, given as [m] int64 indices into PairAnswers, into batches.
Batches = Callable[[PairAnswers, np.ndarray], "list[Batch]"]


@dataclass(frozen=True)
class Batch:
    """The answers of one model call.

    Attributes:
        answers: [m] int64, indices into PairAnswers, in the order in which the scorer gets them.
        num_tokens: positions that the model's body computes, counted by the progress bar.
    """

    answers: np.ndarray
    num_tokens: int


@dataclass(frozen=True)
class BatchesOfAnswers:
    """Batches with a fixed number of answers; only the last one can have fewer.

    Attributes:
        num_answers: answers in a call, 1 or more.
        num_tokens: function that counts the tokens of a call in the scorer's layout.
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
    """Batches with as many prompts, each with all its answers, as fit into a number of tokens.

    If the answers of one prompt don't fit into a call, they are divided over several calls, which
    all contain the prompt. An answer that is too long by itself gets a call of its own.

    Attributes:
        max_tokens: tokens in a call, 1 or more.
        num_tokens: function that counts the tokens of a call in the scorer's layout. The count for
            several prompts must be the sum of the counts for each.
    """

    max_tokens: int
    num_tokens: CountTokens

    def __call__(self, answers: PairAnswers, wanted: np.ndarray) -> list[Batch]:
        batches: list[Batch] = []
        call: list[int] = []
        filled = 0
        for group in _by_prompt(answers, wanted):
            for number, (part, tokens) in enumerate(self._parts(answers, group)):
                # Two parts of a prompt's answers never share a call. The scorer would lay them out
                # as one group, and the group's tokens aren't the sum of the parts' tokens: its
                # shared prefix ends where any of its answers differs from the others.
                if call and (number > 0 or filled + tokens > self.max_tokens):
                    batches.append(Batch(np.array(call), filled))
                    call, filled = [], 0
                call, filled = call + part, filled + tokens
        return [*batches, Batch(np.array(call), filled)] if call else batches

    def _parts(self, answers: PairAnswers, group: list[int]) -> Iterator[tuple[list[int], int]]:
        """Divide the answers of one prompt into parts that fit into a call.

        Yields:
            Answers of a part, and its number of tokens.
        """
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
    """Yield the wanted answers [m] of one prompt at a time.

    Prompts are sorted by their longest sequence, and the answers of a prompt by length; long ones
    come first.
    """
    lengths, prompts = answers.lengths(wanted), answers.prompts(wanted)
    longest = np.zeros(prompts.max(initial=-1) + 1, np.int64)
    np.maximum.at(longest, prompts, lengths)
    # lexsort sorts by its last key first. The prompt's number keeps prompts of one length apart.
    order = np.lexsort((-lengths, prompts, -longest[prompts]))
    starts = np.flatnonzero(np.diff(prompts[order], prepend=-1))
    for group in np.split(wanted[order], starts[1:]):
        if len(group):
            yield group.tolist()
