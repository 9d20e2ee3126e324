"""The token ids of a dataset's answers, compared: which are equal, and how far they agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from dpofast.columns import ID_COLUMNS, UNPAIRED

_LISTS = pa.large_list(pa.int32())  # 64-bit offsets: a dataset can have more than 2**31 tokens


@dataclass(frozen=True, eq=False)
class TokenColumn:
    """A column of lists of token ids.

    Attributes:
        values: all ids, int32.
        offsets: [m+1] int64; list i is values[offsets[i]:offsets[i+1]].
    """

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, *columns: pa.ChunkedArray) -> TokenColumn:
        """The lists of all these columns."""
        chunks = [chunk.cast(_LISTS) for column in columns for chunk in column.chunks]
        lists = pa.chunked_array(chunks, type=_LISTS).combine_chunks()
        if isinstance(lists, pa.ChunkedArray):  # without any chunk
            lists = pa.array([], type=_LISTS)
        return cls(lists.values.to_numpy(), lists.offsets.to_numpy())

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        ids: np.ndarray = self.values[self.offsets[index] : self.offsets[index + 1]]
        return ids

    def digests(self) -> list[bytes]:
        """A hash of each list; lists with equal hashes are taken for equal."""
        return [xxhash.xxh3_128_digest(self[index].data) for index in range(len(self))]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


@dataclass(frozen=True, eq=False)
class AnswerIds:
    """The answers of n pairs, each with its prompt. An answer may occur several times.

    Attributes:
        prompts: r lists, for r rows.
        answers: m lists, for m occurrences of answers.
        rows: [m] int64, the row of each occurrence.
        pairs: [n, 2] int64, occurrences of chosen and rejected.
    """

    prompts: TokenColumn
    answers: TokenColumn
    rows: np.ndarray
    pairs: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """[m] int64: tokens of prompt and answer."""
        return self._prompt_lengths + self.answers.lengths

    @property
    def _prompt_lengths(self) -> np.ndarray:
        """[m] int64: tokens of the prompt of each occurrence."""
        return self.prompts.lengths[self.rows]

    def prompt_numbers(self) -> np.ndarray:
        """[m] int64: equal numbers for equal prompts, in the order of their first pairs."""
        numbers: dict[bytes, int] = {}
        digests = self.prompts.digests()
        for first in self.rows[self.pairs[:, 0]].tolist():
            numbers.setdefault(digests[first], len(numbers))
        found = [numbers.setdefault(digest, len(numbers)) for digest in digests]
        return np.array(found, np.int64)[self.rows]

    def distinct(self, prompts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Number the distinct answers.

        Args:
            prompts: [m] int64, from `prompt_numbers`.

        Returns:
            [A] int64, the first occurrence of each; and [m] int64, the number of each occurrence.
        """
        numbers: dict[tuple[int, bytes], int] = {}
        keys = zip(prompts.tolist(), self.answers.digests(), strict=True)
        found = np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)
        first = np.unique(found, return_index=True)[1]
        return first, found

    def sorted_by_prompt(self, first: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        """[A]: an order of distinct answers, by prompt, and within a prompt by their ids.

        Args:
            first: [A] int64, an occurrence of each.
            prompts: [m] int64, from `prompt_numbers`.
        """
        order = np.argsort(prompts[first], kind="stable")
        of_prompt = prompts[first][order]
        ends = np.flatnonzero(np.diff(of_prompt, append=-1)) + 1
        start = 0
        for end in ends.tolist():
            if end - start > 2:  # two answers are sorted in either order
                group = order[start:end].tolist()
                group.sort(key=lambda answer: self._sort_key(int(first[answer])))
                order[start:end] = group
            start = end
        return order

    def _sort_key(self, occurrence: int) -> bytes:
        # Big-endian bytes sort as the ids do, which are never negative.
        return self.answers[occurrence].astype(">i4").tobytes()

    def shared_with_next(self, first: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        """[A] int64: leading tokens that prompt and answer share with those of the next answer.

        Args:
            first: [A] int64, an occurrence of each answer, sorted by prompt.
            prompts: [m] int64, from `prompt_numbers`.
        """
        shared = np.zeros(len(first), np.int64)
        of_prompt, sizes = prompts[first], self._prompt_lengths
        for index in np.flatnonzero(of_prompt[1:] == of_prompt[:-1]).tolist():
            one, other = int(first[index]), int(first[index + 1])
            begins_alike = _common_prefix(self.answers[one], self.answers[other])
            shared[index] = sizes[one] + begins_alike
        return shared


def answer_ids(pairs: Any) -> AnswerIds:
    """The answers of tokenised pairs.

    Args:
        pairs: a datasets.Dataset with int lists prompt_ids, chosen_ids and rejected_ids.
    """
    table = pairs.select_columns(list(ID_COLUMNS)).with_format("arrow")[:]
    prompts, chosen, rejected = (table[name] for name in ID_COLUMNS)
    number = np.arange(len(table))
    return AnswerIds(
        TokenColumn.of(prompts),
        TokenColumn.of(chosen, rejected),
        rows=np.concatenate([number, number]),
        pairs=np.stack([number, len(table) + number], 1),
    )


def pooled_answer_ids(answers: Any, index: np.ndarray) -> AnswerIds:
    """The answers of pairs that share them.

    Args:
        answers: a datasets.Dataset with int lists prompt_ids and completion_ids.
        index: [n, 2] int64, the chosen and the rejected answer of each pair.
    """
    table = answers.select_columns(list(UNPAIRED.id_columns)).with_format("arrow")[:]
    prompts, completions = (table[name] for name in UNPAIRED.id_columns)
    ids = (TokenColumn.of(prompts), TokenColumn.of(completions))
    return AnswerIds(*ids, rows=np.arange(len(table)), pairs=index)


def _common_prefix(one: np.ndarray, other: np.ndarray) -> int:
    shorter = min(len(one), len(other))
    differs = one[:shorter] != other[:shorter]
    at = int(differs.argmax()) if shorter else 0
    return at if shorter and differs[at] else shorter
