"""Reference log-probs on disk: a folder, in it one folder for each reference, in that segments.

The store knows bytes and keys alone, neither models nor data. Segments are never changed; any
number of processes add their own, and readers see whole ones only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpofast.errors import ReferenceStoreError
from dpofast.reference.files import (
    TEMPORARY_PREFIX,
    list_names,
    make_folder,
    naming_errors,
    write_durably,
)
from dpofast.reference.identity import DIGEST_CHARS, ReferenceIdentity
from dpofast.reference.keys import KEY_BYTES, KeyIndex, as_keys, unique_keys
from dpofast.reference.segments import (
    FORMAT_VERSION,
    NAME_PATTERN,
    Columns,
    Segment,
    write_segment,
)

STORE_FILE = "store.json"
IDENTITY_FILE = "identity.json"
FORMAT_NAME = "dpofast reference store"


def json_text(content: dict[str, Any]) -> str:
    """The one way in which the store writes JSON, so that `verify` can tell every changed byte."""
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


STORE_TEXT = json_text({"format": FORMAT_NAME, "version": FORMAT_VERSION})


def identity_text(identity: ReferenceIdentity) -> str:
    return json_text({"digest": identity.digest, "description": identity.description})


class ReferenceStore:
    """A folder of reference log-probs; made by `ReferenceStore.open`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def open(cls, folder: str | Path, create: bool = False) -> ReferenceStore:
        """Open a store.

        Args:
            folder: of the store.
            create: make it where there is none; the folder must be empty then.

        Raises:
            ReferenceStoreError: no store is there, something else is, or one of another version.
        """
        folder = Path(folder).expanduser()
        path = folder / STORE_FILE
        with naming_errors("read", path):
            exists = path.exists()
        if not exists:
            _refuse_foreign(folder)
            if not create:
                raise ReferenceStoreError(
                    f"There is no reference store in {folder}: check the path, or make one with "
                    "`dpofast ref build`."
                )
            make_folder(folder)
            write_durably(path, STORE_TEXT.encode())
        _check_version(path)
        return cls(folder)

    def namespace(self, identity: ReferenceIdentity) -> Namespace:
        """The rows of one reference; its folder is made when the first is written."""
        return Namespace(self, identity)

    def digests(self) -> list[str]:
        """Of the references that have a folder here, sorted."""
        hexadecimal = set("0123456789abcdef")
        return [
            name
            for name in list_names(self.folder)
            if len(name) == DIGEST_CHARS and set(name) <= hexadecimal
        ]

    def identity(self, digest: str) -> ReferenceIdentity:
        """What a folder's identity.json says.

        Raises:
            ReferenceStoreError: it lacks or is damaged.
        """
        path = self.folder / digest / IDENTITY_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            identity = ReferenceIdentity(content["digest"], content["description"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ReferenceStoreError(
                f"{path} can't be read ({error}): delete that folder, its rows are scored again by "
                "the next build; or delete this file alone, and the next build of that reference "
                "writes it anew."
            ) from error
        if identity.digest != digest:
            raise ReferenceStoreError(
                f"{path} describes the reference {identity.digest}, not its folder's: give the "
                "folder its own name back, or delete it."
            )
        return identity


def _refuse_foreign(folder: Path) -> None:
    """Raise ReferenceStoreError at a folder without store.json that holds something else."""
    names = [name for name in list_names(folder) if not name.startswith(TEMPORARY_PREFIX)]
    # Another process may be making this very store: then its first file is there by now.
    if names and not (folder / STORE_FILE).exists():
        raise ReferenceStoreError(
            f"{folder} is not a reference store: it holds {names[0]!r} but no {STORE_FILE}; choose "
            "an empty or new folder for the store."
        )


def _check_version(path: Path) -> None:
    with naming_errors("read", path):
        text = path.read_bytes()
    try:
        content = json.loads(text)
        name, version = content["format"], content["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ReferenceStoreError(
            f"{path} is damaged ({error}): if the folder is a reference store, replace this file "
            f"by {STORE_TEXT!r}; otherwise choose another folder."
        ) from error
    if name != FORMAT_NAME or version != FORMAT_VERSION:
        raise ReferenceStoreError(
            f"{path} says {name!r} version {version!r}, and this dpofast reads version "
            f"{FORMAT_VERSION}: use the dpofast that wrote it, or choose another folder (the rows "
            "are then scored again)."
        )


@dataclass(frozen=True)
class StoredRows:
    """What the store holds for some keys.

    Attributes:
        found: [n] bool.
        logps: [n] fp64, summed over each answer, in nats; NaN where not found.
        num_tokens: [n] int32; 0 where not found.
        per_token_logps: for each key [num_tokens] fp32, in nats; empty where not found.
    """

    found: np.ndarray
    logps: np.ndarray
    num_tokens: np.ndarray
    per_token_logps: list[np.ndarray]


class Namespace:
    """The rows of one reference.

    Attributes:
        store: that it belongs to.
        identity: of the reference.
        folder: of its segments; need not exist.
    """

    def __init__(self, store: ReferenceStore, identity: ReferenceIdentity) -> None:
        self.store, self.identity = store, identity
        self.folder = store.folder / identity.digest
        self._segments: dict[str, Segment] = {}
        self._order: list[Segment] = []
        self._starts = np.zeros(1, np.int64)  # first row of each segment, and the number of rows
        self._index = KeyIndex(np.empty((0, KEY_BYTES), np.uint8))
        self.refresh()

    def __len__(self) -> int:
        """Rows in all segments; a row that two processes scored counts twice."""
        return int(self._starts[-1])

    def num_unique_rows(self) -> int:
        """Different answers among the rows."""
        keys = [np.empty((0, KEY_BYTES), np.uint8), *(part.columns.keys for part in self._order)]
        return len(unique_keys(np.concatenate(keys))[0])

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
        keys = [np.empty((0, KEY_BYTES), np.uint8), *(part.columns.keys for part in self._order)]
        self._index = KeyIndex(np.concatenate(keys))

    def _names(self) -> set[str]:
        return {name for name in list_names(self.folder) if NAME_PATTERN.fullmatch(name)}

    def contains(self, keys: np.ndarray | Sequence[bytes]) -> np.ndarray:
        """[n, 16] uint8 or n times 16 bytes -> [n] bool; the rows themselves aren't looked at."""
        return self._index.find(as_keys(keys)) >= 0

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
        """All that is stored for these keys.

        Raises:
            ReferenceStoreError: a row is damaged.
        """
        rows = self._index.find(as_keys(keys))  # [n]
        logps = np.full(len(rows), np.nan)
        num_tokens = np.zeros(len(rows), np.int32)
        per_token_logps = [np.empty(0, np.float32)] * len(rows)
        for places, columns, inside in self._checked(rows):
            logps[places] = columns.logps[inside]
            num_tokens[places] = columns.num_tokens[inside]
            for place, row in zip(places.tolist(), inside.tolist(), strict=True):
                per_token_logps[place] = columns.per_token(row)
        return StoredRows(rows >= 0, logps, num_tokens, per_token_logps)

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

    def writer(self, rank: int = 0) -> Writer:
        """Adds rows. Any number of processes may write at once, none waits for another.

        Raises:
            ReferenceStoreError: the folder can't be made or written.
        """
        make_folder(self.folder)
        path = self.folder / IDENTITY_FILE
        if not path.exists():
            write_durably(path, identity_text(self.identity).encode())
        return Writer(self, rank)


class Writer:
    """Gathers rows in memory and commits them, a segment at a time."""

    def __init__(self, namespace: Namespace, rank: int) -> None:
        self._namespace, self._rank = namespace, rank
        self._keys: list[bytes] = []
        self._logps: list[float] = []
        self._per_token: list[np.ndarray] = []
        self.pending_tokens = 0

    @property
    def pending_rows(self) -> int:
        return len(self._keys)

    def add(self, key: bytes, per_token_logps: np.ndarray, name: str = "") -> None:
        """Take a row; it is safe only after `commit`.

        Args:
            key: 16 bytes.
            per_token_logps: [num_tokens] fp32 or fp64, in nats. Summed in fp64 as they come, then
                kept in fp32.
            name: of the row, for the error.

        Raises:
            ReferenceStoreError: a log-prob is NaN or infinite.
        """
        with np.errstate(over="ignore"):  # what float32 can't hold is refused as infinite
            kept = np.asarray(per_token_logps, np.float32)
        if not np.isfinite(kept).all():
            bad = int(np.flatnonzero(~np.isfinite(kept))[0])
            raise ReferenceStoreError(
                f"The reference's log-prob of {name or key.hex()} is {kept[bad]} at the answer's "
                f"token {bad}, and is not stored: check the model's weights and its dtype (float16 "
                "overflows where bfloat16 doesn't), or leave that row out."
            )
        self._keys.append(key)
        self._logps.append(float(np.sum(per_token_logps, dtype=np.float64)))
        self._per_token.append(kept)
        self.pending_tokens += len(kept)

    def commit(self) -> int:
        """Write what was added as a segment; -> its rows, which now survive a kill.

        Others see them after their `refresh`, this process's namespace too.

        Raises:
            ReferenceStoreError: the disk is full or can't be written; the rows are kept in memory,
                so that another `commit` can follow.
        """
        num_rows = self.pending_rows
        if not num_rows:
            return 0
        lengths = [len(values) for values in self._per_token]
        columns = Columns(
            keys=as_keys(self._keys),
            logps=np.array(self._logps),
            num_tokens=np.array(lengths, np.int32),
            offsets=np.cumsum([0, *lengths], dtype=np.int32),
            per_token_logps=np.concatenate(self._per_token),
        )
        write_segment(self._namespace.folder, self._namespace.digest, columns, self._rank)
        self._keys, self._logps, self._per_token, self.pending_tokens = [], [], [], 0
        return num_rows
