"""The rows of one reference."""

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
from dpofast.reference.store.segments import NAME_PATTERN, Columns, Segment
from dpofast.reference.store.writer import Writer


@dataclass(frozen=True)
class StoredRows:
    """What the store holds for some keys.

    Attributes:
        found: [n] bool.
        logps: [n] fp64, summed over each answer, in nats; NaN where not found.
        num_tokens: [n] int32; 0 where not found.
        details: [n] int8, of the values of RowDetail: what of the next two is stored.
        per_token_logps: for each key [num_tokens] fp32, in nats; empty where not stored.
        per_token_logsumexps: of the logits, likewise.
    """

    found: np.ndarray
    logps: np.ndarray
    num_tokens: np.ndarray
    details: np.ndarray
    per_token_logps: list[np.ndarray]
    per_token_logsumexps: list[np.ndarray]


@dataclass(frozen=True)
class RowCounts:
    """The different answers of a namespace.

    Attributes:
        rows: in all.
        tokens: of these answers.
        of_detail: rows that have this detail, or more.
    """

    rows: int
    tokens: int
    of_detail: dict[RowDetail, int]


class Namespace:
    """The rows of one reference.

    Attributes:
        store_folder: of the store that it belongs to.
        identity: of the reference.
        folder: of its segments; need not exist.
    """

    def __init__(self, store_folder: Path, identity: ReferenceIdentity) -> None:
        self.store_folder, self.identity = store_folder, identity
        self.folder = store_folder / identity.digest
        self._segments: dict[str, Segment] = {}
        self._order: list[Segment] = []
        self._starts = np.zeros(1, np.int64)  # first row of each segment, and the number of rows
        self._details = np.empty(0, np.int8)
        self._index = KeyIndex(np.empty((0, KEY_BYTES), np.uint8))
        self.refresh()

    def __len__(self) -> int:
        """Rows in all segments; a row that two processes scored counts twice."""
        return int(self._starts[-1])

    def num_unique_rows(self) -> int:
        """Different answers among the rows."""
        return self.counts().rows

    def counts(self) -> RowCounts:
        """Each different answer once, by its fullest row."""
        rows = np.unique(self._index.find(self._all("keys", np.empty((0, KEY_BYTES), np.uint8))))
        details = self._details[rows]
        return RowCounts(
            rows=len(rows),
            tokens=int(self._all("num_tokens", np.empty(0, np.int32))[rows].sum(dtype=np.int64)),
            of_detail={detail: int((details >= detail).sum()) for detail in RowDetail},
        )

    @property
    def digest(self) -> bytes:
        return bytes.fromhex(self.identity.digest)

    def refresh(self) -> None:
        """See what was committed since, by this process or others; also what was merged by `prune`.

        Raises:
            ReferenceStoreError: a segment can't be opened.
        """
        names = self._names()
        if self._segments.keys() - names:
            names = self._names()  # what took their place stands before they are deleted
        while True:
            try:
                new = {
                    name: Segment(self.folder / name, self.digest)
                    for name in sorted(names - self._segments.keys())
                }
                break
            except ReferenceStoreError:
                before, names = names, self._names()
                if before <= names:  # none of them was merged meanwhile, so one is damaged
                    raise
        held = {name: part for name, part in self._segments.items() if name in names}
        if not new and len(held) == len(self._segments):
            return
        self._segments = held | new
        self._order = list(self._segments.values())
        self._starts = np.cumsum([0, *map(len, self._order)], dtype=np.int64)
        self._details = self._all("details", np.empty(0, np.int8))
        # of equal keys the fullest
        keys = self._all("keys", np.empty((0, KEY_BYTES), np.uint8))
        self._index = KeyIndex(keys, self._details)

    def _all(self, name: str, empty: np.ndarray) -> np.ndarray:
        """One of the segments' columns, all rows."""
        return np.concatenate([empty, *(getattr(part.columns, name) for part in self._order)])

    def _names(self) -> set[str]:
        return {name for name in list_names(self.folder) if NAME_PATTERN.fullmatch(name)}

    def contains(
        self, keys: np.ndarray | Sequence[bytes], detail: RowDetail = RowDetail.SUMS
    ) -> np.ndarray:
        """[n, 16] uint8 or n times 16 bytes -> [n] bool: whether there is a row of this detail.

        The rows themselves aren't looked at.
        """
        rows = self._index.find(as_keys(keys))  # [n]
        held = rows >= 0
        held[held] = self._details[rows[held]] >= detail
        return held

    def lookup(self, keys: np.ndarray | Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Summed log-probs [n] fp64 in nats (NaN where there is none), and which were found [n].

        Raises:
            ReferenceStoreError: a row is damaged.
        """
        rows = self._index.find(as_keys(keys))  # [n]
        logps = np.full(len(rows), np.nan)
        for places, columns, inside in self._checked(rows):
            logps[places] = columns.logps[inside]
        return logps, rows >= 0

    def read(self, keys: np.ndarray | Sequence[bytes]) -> StoredRows:
        """All that is stored for these keys; of rows that stand twice the fullest.

        Raises:
            ReferenceStoreError: a row is damaged.
        """
        rows = self._index.find(as_keys(keys))  # [n]
        logps = np.full(len(rows), np.nan)
        num_tokens = np.zeros(len(rows), np.int32)
        details = np.zeros(len(rows), np.int8)
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
        """Rows [n] of the index, -1 for none, segment by segment, their checksums compared.

        Yields:
            Where in `rows` those of a segment stand [m], its columns, and the rows in these [m].
        """
        order = np.argsort(rows, kind="stable")  # in the order of the files
        limits = np.searchsorted(rows[order], self._starts)
        for number, segment in enumerate(self._order):
            places = order[limits[number] : limits[number + 1]]
            if len(places):
                inside = rows[places] - self._starts[number]
                segment.check(inside)
                yield places, segment.columns, inside

    def writer(self, rank: int = 0, detail: RowDetail = RowDetail.LOGPS) -> Writer:
        """Adds rows. Any number of processes may write at once, none waits for another.

        Args:
            rank: of this process.
            detail: what is stored of each row.

        Raises:
            ReferenceStoreError: the folder can't be made or written.
        """
        make_folder(self.folder)
        path = self.folder / IDENTITY_FILE
        if not path.exists():
            write_durably(path, identity_text(self.identity).encode())
        return Writer(self.folder, self.digest, rank, detail)
