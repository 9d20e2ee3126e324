"""What a row of the store is looked up by: a hash of its prompt's and its answer's token ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from xxhash import xxh3_128_digest

KEY_BYTES = 16


@dataclass(frozen=True)
class TokenLists:
    """Many lists of token ids in one array.

    Attributes:
        values: [T] int64, the lists one after another.
        offsets: [n + 1] int64; list i is values[offsets[i]:offsets[i + 1]].
    """

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, lists: Iterable[Sequence[int]]) -> TokenLists:
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
    """The 16 bytes that stand for an answer after a prompt.

    XXH3-128 (big-endian digest) of: the prompt's length, its ids, the answer's length, its ids,
    each a little-endian int64. The lengths keep "ab" + "c" apart from "a" + "bc".
    """
    return row_keys(TokenLists.of([prompt_ids]), TokenLists.of([answer_ids])).tobytes()


def row_keys(prompts: TokenLists, answers: TokenLists) -> np.ndarray:
    """Keys of many rows: -> [n, 16] uint8; row i is `row_key(prompts[i], answers[i])`."""
    keys = np.empty((len(answers), KEY_BYTES), dtype=np.uint8)
    parts = [
        (_bytes(lists.values), (8 * lists.offsets).tolist(), _bytes(lists.lengths))
        for lists in (prompts, answers)
    ]
    digests = []
    for row in range(len(answers)):
        pieces = []
        for values, offsets, lengths in parts:
            pieces += [lengths[8 * row : 8 * row + 8], values[offsets[row] : offsets[row + 1]]]
        digests.append(xxh3_128_digest(b"".join(pieces)))
    if digests:
        keys[:] = np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, KEY_BYTES)
    return keys


def _bytes(values: np.ndarray) -> memoryview:
    return np.ascontiguousarray(values, dtype="<i8").data.cast("B")


def as_keys(keys: np.ndarray | Sequence[bytes]) -> np.ndarray:
    """Keys in either form -> [n, 16] uint8, contiguous."""
    if isinstance(keys, np.ndarray):
        return np.ascontiguousarray(keys, dtype=np.uint8).reshape(-1, KEY_BYTES)
    return np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_BYTES)


def unique_keys(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For [n, 16] keys: each different key's first row [u], and which of these each row is [n]."""
    as_one = np.ascontiguousarray(keys).view(f"S{KEY_BYTES}").ravel()
    _, first, inverse = np.unique(as_one, return_index=True, return_inverse=True)
    return first, inverse


class KeyIndex:
    """Where each key stands among the store's rows: sorted, looked up by bisection.

    Args:
        keys: [n, 16] uint8.
        ranks: [n] int8; of equal keys the one of highest rank is found, of these the first.
    """

    def __init__(self, keys: np.ndarray, ranks: np.ndarray | None = None) -> None:
        words = np.ascontiguousarray(keys).view(">u8").astype(np.uint64)  # [n, 2]
        # A hash's first half alone orders the rows but for the rarest collisions.
        if ranks is None:
            self._order = np.argsort(words[:, 0], kind="stable")
        else:
            self._order = np.lexsort((-ranks, words[:, 0]))
        self._words = words[self._order]

    def __len__(self) -> int:
        return len(self._order)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """[m, 16] uint8 -> [m] int64, the row of each key, -1 where there is none."""
        wanted = np.ascontiguousarray(keys).view(">u8").astype(np.uint64)  # [m, 2]
        rows = np.full(len(wanted), -1, dtype=np.int64)
        places = np.searchsorted(self._words[:, 0], wanted[:, 0])  # [m]
        open_ = np.arange(len(wanted))
        while True:
            open_ = open_[places[open_] < len(self._order)]
            here = self._words[places[open_]]  # [k, 2]
            same_first = here[:, 0] == wanted[open_, 0]
            same = same_first & (here[:, 1] == wanted[open_, 1])
            rows[open_[same]] = self._order[places[open_[same]]]
            # the same first half, another second one: look one place further
            open_ = open_[same_first & ~same]
            if not len(open_):
                return rows
            places[open_] += 1
