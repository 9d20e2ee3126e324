"""Namespaces: the stored rows of one reference, and how to look them up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpofast.errors import ReferenceStoreError
from dpofast.reference.identity.description import ReferenceIdentity
from dpofast.reference.store.files import list_names, make_folder, write_durably
from dpofast.reference.store.format import IDENTITY_FILE, identity_text
from dpofast.reference.store.keys import KEY_BYTES, KeyIndex, as_keys
from dpofast.reference.store.row_detail import RowDetail
from dpofast.reference.store.segments import Columns, Segment, segment_names
from dpofast.reference.store.writer import Writer


@dataclass(frozen=True)
class StoredRows:
    """All stored values of the rows with given keys.

    Attributes:
        found: [n] bool, whether there is a row with each key. The other values of a key that isn't
            found are NaN, 0 or empty.
        logps: [n] fp64, log-prob of each answer, summed over its tokens, in nats.
        num_tokens: [n] int32, tokens in each answer.
        details: [n] int8, RowDetail of each row.
        per_token_logps: [num_tokens] fp32 for each key, in nats; empty if not stored.
        per_token_logsumexps: [num_tokens] fp32 for each key, log-sum-exps of the logits; empty if
            not stored.
    """

    found: np.ndarray
    logps: np.ndarray
    num_tokens: np.ndarray
    details: np.ndarray
    per_token_logps: list[np.ndarray]
    per_token_logsumexps: list[np.ndarray]


@dataclass(frozen=True)
class RowCounts:
    """Number of distinct answers in a namespace.

    Attributes:
        rows: number of answers, each counted once.
        tokens: tokens in these answers.
        of_detail: number of answers with at least the given detail.
    """

    rows: int
    tokens: int
    of_detail: dict[RowDetail, int]


class Namespace:
    """The rows of one reference.

    It sees the segments that existed when it was made, and later ones after `refresh`.

    Attributes:
        store_folder: folder of the store.
        identity: identity of the reference.
        folder: folder of the reference's segments. It needn't exist; the first writer makes it.
    """

    def __init__(self, store_folder: Path, identity: ReferenceIdentity) -> None:
        self.store_folder, self.identity = store_folder, identity
        self.folder = store_folder / identity.digest
        self._segments: dict[str, Segment] = {}
        self._order: list[Segment] = []
        # Rows are numbered consecutively through all segments, in the order of `_order`.
        self._starts = np.zeros(1, np.int64)  # first row of each segment, then the number of rows
        self._details = np.empty(0, np.int8)  # detail of each row
        self._index = KeyIndex(np.empty((0, KEY_BYTES), np.uint8))
        self.refresh()

    def __len__(self) -> int:
        """Number of rows in all segments; an answer that two processes scored counts twice."""
        return int(self._starts[-1])

    def num_unique_rows(self) -> int:
        """Number of distinct answers among the rows."""
        return self.counts().rows

    def counts(self) -> RowCounts:
        """Count each distinct answer once, by its row with the highest detail."""
        rows = np.unique(self._index.find(self._all("keys", np.empty((0, KEY_BYTES), np.uint8))))
        details = self._details[rows]
        return RowCounts(
            rows=len(rows),
            tokens=int(self._all("num_tokens", np.empty(0, np.int32))[rows].sum(dtype=np.int64)),
            of_detail={detail: int((details >= detail).sum()) for detail in RowDetail},
        )

    @property
    def digest(self) -> bytes:
        """The reference's digest as 16 bytes."""
        return bytes.fromhex(self.identity.digest)

    def refresh(self) -> None:
        """Open the segments that are new, and drop the ones that are gone.

        New segments come from commits of this process or others, or from a `prune` that merged
        older ones.

        Raises:
            ReferenceStoreError: a segment can't be opened.
        """
        names = self._names()
        if self._segments.keys() - names:
            # A prune has deleted segments. The first listing may have been too early to contain
            # their replacement; a second one has it, because the replacement is written first.
            names = self._names()
        while True:
            try:
                new = {
                    name: Segment(self.folder / name, self.digest)
                    for name in sorted(names - self._segments.keys())
                }
                break
            except ReferenceStoreError:
                before, names = names, self._names()
                if before <= names:  # all are still there, so no prune explains the error
                    raise
        held = {name: part for name, part in self._segments.items() if name in names}
        if not new and len(held) == len(self._segments):
            return  # the index is still right
        self._segments = held | new
        self._order = list(self._segments.values())
        self._starts = np.cumsum([0, *map(len, self._order)], dtype=np.int64)
        self._details = self._all("details", np.empty(0, np.int8))
        # Among rows with the same key, the index finds the one with the highest detail.
        keys = self._all("keys", np.empty((0, KEY_BYTES), np.uint8))
        self._index = KeyIndex(keys, self._details)

    def _all(self, name: str, empty: np.ndarray) -> np.ndarray:
        """Concatenate a column over all segments; `empty` gives its dtype if there are none."""
        return np.concatenate([empty, *(getattr(part.columns, name) for part in self._order)])

    def _names(self) -> set[str]:
        """List the segments in the folder."""
        return set(segment_names(list_names(self.folder)))

    def contains(
        self, keys: np.ndarray | Sequence[bytes], detail: RowDetail = RowDetail.SUMS
    ) -> np.ndarray:
        """Tell which keys have a row with at least this detail.

        Args:
            keys: [n, 16] uint8, or n keys of 16 bytes.
            detail: least detail that counts.

        Returns:
            [n] bool. The checksums of the rows aren't compared.
        """
        rows = self._index.find(as_keys(keys))  # [n]
        held = rows >= 0
        held[held] = self._details[rows[held]] >= detail
        return held

    def lookup(self, keys: np.ndarray | Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Read the summed log-probs of these keys.

        Args:
            keys: [n, 16] uint8, or n keys of 16 bytes.

        Returns:
            Log-probs in nats, NaN for a key without a row: [n] fp64; and whether each key has a
            row: [n] bool.

        Raises:
            ReferenceStoreError: a row is damaged.
        """
        rows = self._index.find(as_keys(keys))  # [n]
        logps = np.full(len(rows), np.nan)
        for places, columns, inside in self._checked(rows):
            logps[places] = columns.logps[inside]
        return logps, rows >= 0

    def read(self, keys: np.ndarray | Sequence[bytes]) -> StoredRows:
        """Read all stored values of these keys, from the row with the highest detail.

        Args:
            keys: [n, 16] uint8, or n keys of 16 bytes.

        Raises:
            ReferenceStoreError: a row is damaged.
        """
        rows = self._index.find(as_keys(keys))  # [n]
        logps = np.full(len(rows), np.nan)
        num_tokens = np.zeros(len(rows), np.int32)
        details = np.zeros(len(rows), np.int8)
        # Keys without values share one empty array, to which nobody writes.
        per_token_logps = [np.empty(0, np.float32)] * len(rows)
        per_token_logsumexps = [np.empty(0, np.float32)] * len(rows)
        for places, columns, inside in self._checked(rows):
            logps[places] = columns.logps[inside]
            num_tokens[places] = columns.num_tokens[inside]
            details[places] = columns.details[inside]
            for place, row in zip(places.tolist(), inside.tolist(), strict=True):
                per_token_logps[place] = columns.per_token_logps[row]
                per_token_logsumexps[place] = columns.per_token_logsumexps[row]
        return StoredRows(
            rows >= 0, logps, num_tokens, details, per_token_logps, per_token_logsumexps
        )

    def _checked(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, Columns, np.ndarray]]:
        """Compare the checksums of rows, one segment after another.

        Args:
            rows: [n] int64, numbers of rows; -1 is skipped.

        Yields:
            For each segment with any of the rows: their indices in `rows` [m], the segment's
            columns, and the rows' indices in these columns [m].
        """
        # Sorted, the rows of a segment are neighbours, and memory is read in the order of the file.
        order = np.argsort(rows, kind="stable")
        limits = np.searchsorted(rows[order], self._starts)
        for number, segment in enumerate(self._order):
            places = order[limits[number] : limits[number + 1]]
            if len(places):
                inside = rows[places] - self._starts[number]
                segment.check(inside)
                yield places, segment.columns, inside

    def writer(self, rank: int = 0, detail: RowDetail = RowDetail.LOGPS) -> Writer:
        """Make a writer that adds rows.

        Any number of processes can write at the same time; none waits for another.

        Args:
            rank: rank of this process, used in the names of segments.
            detail: values to store for each row.

        Raises:
            ReferenceStoreError: the folder can't be made or written.
        """
        make_folder(self.folder)
        path = self.folder / IDENTITY_FILE
        # Two processes can get here at once. Both write the same text, so either may win.
        if not path.exists():
            write_durably(path, identity_text(self.identity).encode())
        return Writer(self.folder, self.digest, rank, detail)
