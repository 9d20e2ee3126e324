"""Keys of stored rows: hashes of the token ids of a prompt and an answer, and an index of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from xxhash import xxh3_128_digest

KEY_BYTES = 16


@dataclass(frozen=True)
class TokenLists:
    """Many lists of token ids in two arrays.

    Attributes:
        values: [T] int64, the lists one after another.
        offsets: [n + 1] int64; list i is values[offsets[i]:offsets[i + 1]].
    """

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, lists: Iterable[Sequence[int]]) -> TokenLists:
        """Make the arrays from lists."""
        arrays = [np.asarray(ids, dtype="<i8") for ids in lists]
        offsets = np.cumsum([0, *(len(ids) for ids in arrays)], dtype=np.int64)
        return cls(np.concatenate([np.empty(0, "<i8"), *arrays]), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        start, end = self.offsets[index : index + 2]
        return self.values[start:end]

    @property
    def lengths(self) -> np.ndarray:  # [n]
        return np.diff(self.offsets)


def row_key(prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> bytes:
    """Make the key of an answer after a prompt.

    The key is the big-endian XXH3-128 of the prompt's length, the prompt's ids, the answer's length
    and the answer's ids, all as little-endian int64. The lengths mark where the prompt ends, so
    that prompt "ab" with answer "c" differs from prompt "a" with answer "bc".

    Returns:
        16 bytes.
    """
    return row_keys(TokenLists.of([prompt_ids]), TokenLists.of([answer_ids])).tobytes()


def row_keys(prompts: TokenLists, answers: TokenLists) -> np.ndarray:
    """Make the keys of many answers.

    Args:
        prompts: n lists of prompt ids.
        answers: n lists of answer ids.

    Returns:
        [n, 16] uint8; entry i is `row_key(prompts[i], answers[i])`.
    """
    keys = np.empty((len(answers), KEY_BYTES), dtype=np.uint8)
    # Slices of byte views cost no conversion; offsets are in bytes, 8 for each id.
    parts = [
        (_bytes(lists.values), (8 * lists.offsets).tolist(), _bytes(lists.lengths))
        for lists in (prompts, answers)
    ]
    digests = []
    for i in range(len(answers)):
        pieces = []
        for values, offsets, lengths in parts:
            pieces += [lengths[8 * i : 8 * i + 8], values[offsets[i] : offsets[i + 1]]]
        digests.append(xxh3_128_digest(b"".join(pieces)))
    if digests:
        keys[:] = np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, KEY_BYTES)
    return keys


def _bytes(values: np.ndarray) -> memoryview:
    """View integers as little-endian int64 bytes."""
    return np.ascontiguousarray(values, dtype="<i8").data.cast("B")


def as_keys(keys: np.ndarray | Sequence[bytes]) -> np.ndarray:
    """Turn keys in either form into a contiguous array: [n, 16] uint8."""
    if isinstance(keys, np.ndarray):
        return np.ascontiguousarray(keys, dtype=np.uint8).reshape(-1, KEY_BYTES)
    return np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_BYTES)


def unique_keys(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the distinct keys among [n, 16] keys.

    Returns:
        first: [u] int64, first index of each distinct key.
        inverse: [n] int64, index into `first` for each key.
    """
    as_one = np.ascontiguousarray(keys).view(f"S{KEY_BYTES}").ravel()
    _, first, inverse = np.unique(as_one, return_index=True, return_inverse=True)
    return first, inverse


class KeyIndex:
    """Finds the rows with given keys, by bisection in the sorted keys.

    Args:
        keys: [n, 16] uint8, key of each row.
        details: [n] int8, detail of each row. Among rows with the same key, the index finds the
            first one of the highest detail. None if all rows have the same detail.
    """

    def __init__(self, keys: np.ndarray, details: np.ndarray | None = None) -> None:
        halves = _halves(keys)  # [n, 2]
        # Sorting by the first half is enough: two keys hardly ever share it, and `find` then looks
        # at the second half.
        if details is None:
            self._order = np.argsort(halves[:, 0], kind="stable")
        else:
            self._order = np.lexsort((-details, halves[:, 0]))
        self._halves = halves[self._order]

    def __len__(self) -> int:
        return len(self._order)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Find the rows with these keys.

        Args:
            keys: [m, 16] uint8.

        Returns:
            [m] int64, the row of each key, or -1 if no row has it.
        """
        wanted = _halves(keys)  # [m, 2]
        rows = np.full(len(wanted), -1, dtype=np.int64)
        places = np.searchsorted(self._halves[:, 0], wanted[:, 0])  # [m]
        undecided = np.arange(len(wanted))
        while True:
            undecided = undecided[places[undecided] < len(self._order)]
            here = self._halves[places[undecided]]  # [k, 2]
            same_first = here[:, 0] == wanted[undecided, 0]
            same = same_first & (here[:, 1] == wanted[undecided, 1])
            rows[undecided[same]] = self._order[places[undecided[same]]]
            # The same first half with another second half: the key may be one place further.
            undecided = undecided[same_first & ~same]
            if not len(undecided):
                return rows
            places[undecided] += 1


def _halves(keys: np.ndarray) -> np.ndarray:
    """Split [n, 16] uint8 keys into two numbers each: [n, 2] uint64."""
    return np.ascontiguousarray(keys).view(">u8").astype(np.uint64)
