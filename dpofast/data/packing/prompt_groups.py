"""Which pairs of a dataset have the same prompt, and what the answers to it have in common."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpofast.data.packing.answer_ids import AnswerIds, answer_ids, pooled_answer_ids

# Pairs in a row that a part may refuse before it is closed. More hardly fill rows better.
PATIENCE = 64


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

        Args:
            pairs: some pairs, counted in the dataset.
            max_tokens: most tokens in a part of more than two answers; None for no limit.

        Returns:
            The parts, by the first appearance of their prompts.
        """
        parts: list[Part] = []
        for group in self._of_prompts(pairs):
            if len(group) == 1:
                parts.append(Part(group, int(self.pair_tokens[group[0]])))
            else:
                parts += self._cut(group, max_tokens)
        return parts

    def uncut(self, pairs: Sequence[int]) -> list[list[int]]:
        """Group pairs by their prompts; arguments and order as in `parts`, but nothing is cut."""
        return [
            [group[place] for place in _neighbours(range(len(group)), self.answers[group].tolist())]
            for group in self._of_prompts(pairs)
        ]

    def _of_prompts(self, pairs: Sequence[int]) -> list[list[int]]:
        """The pairs of each prompt."""
        rows = np.asarray(pairs, np.int64)
        # A pair whose answers are the same stays alone, as it needs both of them.
        keys = np.where(np.diff(self.answers[rows])[:, 0] == 0, -1 - rows, self.prompts[rows])
        of_prompt: dict[int, list[int]] = {}
        for pair, key in zip(pairs, keys.tolist(), strict=True):
            of_prompt.setdefault(key, []).append(pair)
        return list(of_prompt.values())

    def _cut(self, group: list[int], max_tokens: int | None) -> list[Part]:
        """The parts of some pairs of one prompt."""
        waiting = _WaitingPairs(np.sort(self.answers[group], 1).tolist())
        parts = []
        while waiting:
            part = _GrowingPart(self, max_tokens)
            places = waiting.taken_by(part)
            pairs = [group[place] for place in _neighbours(places, waiting.both)]
            parts.append(Part(pairs, part.tokens))
        return parts

    def tokens_of_pair(self, low: int, high: int) -> int:
        """Tokens of a pair of two answers in a row that shares their prefix."""
        return int(self.lengths[low] + self.lengths[high]) - self.prefix(low, high)

    def prefix(self, low: int, high: int) -> int:
        """Leading tokens that the answers from `low` to `high`, both of one prompt, share."""
        return int(self.lengths[low]) if low == high else self._shared.one(low, high)


class _GrowingPart:
    """A part of a group, while answers are added to it."""

    def __init__(self, groups: PromptGroups, max_tokens: int | None) -> None:
        self.groups, self.max_tokens = groups, max_tokens
        self.answers: set[int] = set()
        self.tokens = 0
        self._sum = 0  # of the answers' lengths
        self._low = self._high = -1

    def takes(self, low: int, high: int) -> bool:
        """Add the answers of a pair, if that is right; says whether it is."""
        groups, new = self.groups, {low, high} - self.answers
        if not new:
            return True
        total = self._sum + sum(int(groups.lengths[answer]) for answer in new)
        lowest = min(low, self._low) if self.answers else low
        highest = max(high, self._high)
        count = len(self.answers) + len(new)
        tokens = total - (count - 1) * groups.prefix(lowest, highest)
        if self.answers:
            if tokens > self.tokens + groups.tokens_of_pair(low, high):
                return False
            if self.max_tokens is not None and tokens > self.max_tokens:
                return False
        self.tokens, self._sum, self._low, self._high = tokens, total, lowest, highest
        self.answers |= new
        return True


class _WaitingPairs:
    """The pairs of a group that no part has yet; the effort grows as their number does.

    Args:
        both: the two different answers of each pair, the lower number first.
    """

    def __init__(self, both: list[list[int]]) -> None:
        self.both = both
        # By the lower and the higher answer: the places of these pairs in the group.
        self._places: dict[int, dict[int, list[int]]] = {}
        for place, (low, high) in enumerate(both):
            self._places.setdefault(low, {}).setdefault(high, []).append(place)
        # Neighbours have most in common. Pairs that a part has taken can still be here.
        self._next = deque((low, high) for low in sorted(self._places) for high in self._of(low))

    def __len__(self) -> int:
        return len(self._places)

    def _of(self, low: int) -> list[int]:
        return sorted(self._places[low])

    def taken_by(self, part: _GrowingPart) -> list[int]:
        """Let a part take pairs from the first one on, and remove these.

        Returns:
            Their places in the group, ascending.
        """
        missed: list[tuple[int, int]] = []
        while self._next and len(missed) < PATIENCE:
            low, high = self._next.popleft()
            if high in self._places.get(low, ()) and not part.takes(low, high):
                missed.append((low, high))
        self._next.extendleft(reversed(missed))
        found: list[int] = []
        for low in part.answers & self._places.keys():  # all pairs that need no more answers
            highs = self._places[low]
            for high in part.answers & highs.keys():
                found += highs.pop(high)
            if not highs:
                del self._places[low]
        return sorted(found)


def _neighbours(places: Sequence[int], both: Sequence[Sequence[int]]) -> list[int]:
    """The places of pairs, with those that are linked by answers together.

    Args:
        places: some pairs.
        both: the two answers of each pair.
    """
    leader: dict[int, int] = {}  # of an answer: another answer that is linked to it

    def leader_of(answer: int) -> int:
        while leader.setdefault(answer, answer) != answer:
            leader[answer] = leader[leader[answer]]  # so that chains stay short
            answer = leader[answer]
        return answer

    for place in places:
        one, other = both[place]
        leader[leader_of(one)] = leader_of(other)
    linked: dict[int, list[int]] = {}
    for place in places:
        linked.setdefault(leader_of(both[place][0]), []).append(place)
    return [place for together in linked.values() for place in together]


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
