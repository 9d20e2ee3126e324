"""Which pairs of a dataset have the same prompt, and what the answers to it have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpofast.data.packing.answer_ids import AnswerIds, answer_ids, pooled_answer_ids


@dataclass(frozen=True)
class Part:
    """Pairs of one prompt that a row holds as one group: a shared prefix, then each answer once.

    Attributes:
        pairs: the pairs, counted in the dataset. They keep their order, except that those that are
            linked by answers in common are neighbours.
        tokens: tokens of the group in a packed row that shares prefixes.
    """

    pairs: list[int]
    tokens: int


class PromptGroups:
    """The prompts and the distinct answers of n pairs.

    Two answers are the same if their prompts and they themselves have the same token ids.

    Args:
        prompts: [n] int64, number of each pair's prompt, in the order of first appearance.
        answers: [n, 2] int64, numbers of its chosen and its rejected answer. Answers are numbered
            by prompt, and within a prompt in the order of their ids.
        lengths: [A] int64, tokens of the prompt and the answer.
        shared: [A] int64, leading tokens that prompt and answer have in common with the next ones;
            0 where the next answer has another prompt.

    Attributes:
        prompts, answers, lengths: as above.
        pair_tokens: [n] int64, tokens of each pair alone in a packed row that shares its prefix.
    """

    def __init__(
        self, prompts: np.ndarray, answers: np.ndarray, lengths: np.ndarray, shared: np.ndarray
    ) -> None:
        self.prompts, self.answers, self.lengths = prompts, answers, lengths
        low, high = answers.min(1), answers.max(1)  # [n]
        self._shared = _RangeMinimum(shared, int((high - low).max(initial=1)))
        prefixes = np.where(low == high, lengths[low], self._shared.of(low, np.maximum(high, 1)))
        self.pair_tokens: np.ndarray = lengths[answers].sum(1) - prefixes

    @classmethod
    def of(cls, pairs: Any) -> PromptGroups:
        """Find the groups of a datasets.Dataset of tokenised pairs."""
        return cls._numbered(answer_ids(pairs))

    @classmethod
    def of_pool(cls, answers: Any, index: np.ndarray) -> PromptGroups:
        """Find the groups of pairs that share answers.

        Args:
            answers: datasets.Dataset with int lists prompt_ids and completion_ids.
            index: [n, 2] int64, the chosen and the rejected answer of each pair.
        """
        return cls._numbered(pooled_answer_ids(answers, index))

    @classmethod
    def _numbered(cls, ids: AnswerIds) -> PromptGroups:
        prompts = ids.prompt_numbers()  # of each occurrence of an answer
        first, found = ids.distinct(prompts)  # occurrence of each answer; answer of each occurrence
        order = ids.sorted_by_prompt(first, prompts)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        first = first[order]
        numbers = rank[found]  # [occurrences]
        lengths = ids.lengths[first]
        return cls(
            prompts[ids.pairs[:, 0]],
            numbers[ids.pairs],
            lengths,
            ids.shared_with_next(first, prompts),
        )

    def __len__(self) -> int:
        return len(self.prompts)

    def parts(self, pairs: Sequence[int], max_tokens: int | None = None) -> list[Part]:
        """Group pairs by their prompts, and cut groups that don't fit or would save nothing.

        A part takes a pair if both fit a row and need no more tokens together than apart. They can
        need more, because a longer prefix that the two answers of a pair share may be none of the
        whole group.

        The parts of some of the result's parts are these parts again, so that a row can be laid out
        from its pairs alone.

        Args:
            pairs: some pairs, counted in the dataset.
            max_tokens: most tokens in a part of more than two answers; None for no limit.

        Returns:
            The parts, by the first appearance of their prompts.
        """
        rows = np.asarray(pairs, np.int64)
        # A pair whose answers are the same stays alone, as it needs both of them.
        keys = np.where(np.diff(self.answers[rows])[:, 0] == 0, -1 - rows, self.prompts[rows])
        of_prompt: dict[int, list[int]] = {}
        for pair, key in zip(pairs, keys.tolist(), strict=True):
            of_prompt.setdefault(key, []).append(pair)
        parts: list[Part] = []
        for group in of_prompt.values():
            if len(group) == 1:
                parts.append(Part(group, int(self.pair_tokens[group[0]])))
            else:
                parts += self._cut(group, max_tokens)
        return parts

    def _cut(self, group: list[int], max_tokens: int | None) -> list[Part]:
        """The parts of some pairs of one prompt."""
        answers = np.sort(self.answers[group], 1)  # [P, 2]
        order = np.lexsort((np.array(group), answers[:, 1], answers[:, 0]))
        waiting = [(i, int(answers[i, 0]), int(answers[i, 1])) for i in order.tolist()]
        parts = []
        while waiting:
            part, left = _GrowingPart(self), []
            for pair in waiting:
                if not part.takes(pair, max_tokens):
                    left.append(pair)
            pairs = [group[i] for i in _neighbours(sorted(part.pairs))]
            parts.append(Part(pairs, part.tokens))
            waiting = left
        return parts

    def tokens_of_pair(self, low: int, high: int) -> int:
        """Tokens of a pair of two answers in a row that shares their prefix."""
        return int(self.lengths[low] + self.lengths[high]) - self.prefix(low, high)

    def prefix(self, low: int, high: int) -> int:
        """Leading tokens that the answers from `low` to `high`, both of one prompt, share."""
        return int(self.lengths[low]) if low == high else self._shared.one(low, high)


class _GrowingPart:
    """A part of a group, while pairs are added to it."""

    def __init__(self, groups: PromptGroups) -> None:
        self.groups = groups
        self.pairs: list[tuple[int, int, int]] = []  # place of a pair in the group, two answers
        self.tokens = 0
        self._answers: set[int] = set()
        self._sum = self._prefix = 0  # of their lengths; of what they share
        self._low = self._high = -1

    def takes(self, candidate: tuple[int, int, int], max_tokens: int | None) -> bool:
        """Add a pair with its two answers, if that is right; says whether it is."""
        groups, (_, low, high) = self.groups, candidate
        new = {low, high} - self._answers
        if new:
            added = sum(int(groups.lengths[answer]) for answer in new)
            # At least what it takes if the prefix gets no shorter: most pairs fail this at once.
            least = self.tokens + added - len(new) * self._prefix
            if self.pairs and max_tokens is not None and least > max_tokens:
                return False
            total = self._sum + added
            lowest = min(low, self._low) if self.pairs else low
            highest = max(high, self._high)
            count = len(self._answers) + len(new)
            prefix = groups.prefix(lowest, highest)
            tokens = total - (count - 1) * prefix
            if self.pairs:
                if tokens > self.tokens + groups.tokens_of_pair(low, high):
                    return False
                if max_tokens is not None and tokens > max_tokens:
                    return False
            self.tokens, self._sum, self._prefix = tokens, total, prefix
            self._low, self._high = lowest, highest
            self._answers |= new
        self.pairs.append(candidate)
        return True


def _neighbours(pairs: Sequence[tuple[int, int, int]]) -> list[int]:
    """The pairs, each (place, answer, answer), with those that are linked by answers together."""
    leader: dict[int, int] = {}  # of an answer: another answer that is linked to it

    def leader_of(answer: int) -> int:
        while leader.setdefault(answer, answer) != answer:
            answer = leader[answer]
        return answer

    for _, one, other in pairs:
        leader[leader_of(one)] = leader_of(other)
    linked: dict[int, list[int]] = {}
    for pair, one, _ in pairs:
        linked.setdefault(leader_of(one), []).append(pair)
    return [pair for together in linked.values() for pair in together]


class _RangeMinimum:
    """Minima of ranges of an array, from minima of all ranges whose length is a power of two.

    Args:
        values: [A] int64.
        longest: length of the longest range that is asked for.
    """

    def __init__(self, values: np.ndarray, longest: int) -> None:
        self._levels = [values]
        while 2 ** len(self._levels) <= min(longest, len(values)):
            below, half = self._levels[-1], 2 ** (len(self._levels) - 1)
            self._levels.append(np.minimum(below[:-half], below[half:]))

    def one(self, start: int, end: int) -> int:
        """The minimum of values[start:end]."""
        level = min((end - start).bit_length(), len(self._levels)) - 1
        values, size = self._levels[level], 2**level
        return int(min(values[[*range(start, end - size, size), end - size]]))

    def of(
        self,
        starts: np.ndarray,  # [n]
        ends: np.ndarray,  # [n]
    ) -> np.ndarray:
        """[n]: the minimum of each range of at most `longest`; of an empty one, anything."""
        found = np.zeros_like(starts)
        for level, values in enumerate(self._levels):
            size = 2**level
            at = np.flatnonzero((ends - starts >= size) & (ends - starts < 2 * size))
            found[at] = np.minimum(values[starts[at]], values[ends[at] - size])
        return found
