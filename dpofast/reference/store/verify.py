"""Checks whether every byte of a store is as it was written."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dpofast.counted import counted
from dpofast.errors import ReferenceStoreError
from dpofast.reference.identity.readable import printable
from dpofast.reference.store.files import TEMPORARY_PREFIX, list_names, naming_errors
from dpofast.reference.store.format import IDENTITY_FILE, STORE_FILE, STORE_TEXT, identity_text
from dpofast.reference.store.keys import unique_keys
from dpofast.reference.store.segments import (
    Columns,
    Segment,
    damaged,
    is_named_by,
    segment_names,
)
from dpofast.reference.store.store import ReferenceStore
from dpofast.reference.store.text import human_bytes

# Nats per token by which two scorings of one answer can differ in bfloat16, in different batches.
CONFLICT_TOLERANCE = 0.05


@dataclass
class VerifyReport:
    """What `verify` read and what it found.

    Attributes:
        folder: folder of the store.
        references: number of references with a folder in use.
        segments: number of segments read.
        rows: number of rows in the undamaged segments.
        bytes: number of bytes read.
        faults: sentences about damage, each with a file and the remedy; empty if there is none.
        notes: sentences about files that the user should know about, though nothing is damaged.
    """

    folder: Path
    references: int = 0
    segments: int = 0
    rows: int = 0
    bytes: int = 0
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether everything is as it was written."""
        return not self.faults

    def lines(self) -> list[str]:
        """Write the report for people, in printable characters only."""
        verdict = "all as it was written" if self.ok else f"{len(self.faults)} problems"
        lines = [
            f"{self.folder}: {counted(self.rows, 'row')} of "
            f"{counted(self.references, 'reference')} in "
            f"{counted(self.segments, 'segment')}, {human_bytes(self.bytes)} read: {verdict}",
            *self.faults,
            *(f"Note: {note}" for note in self.notes),
        ]
        return [printable(line) for line in lines]


def verify(folder: str | Path) -> VerifyReport:
    """Read every byte of a store and compare its checksums, without changing anything.

    Args:
        folder: folder of the store.

    Raises:
        ReferenceStoreError: the folder isn't a store, or one of another version.
    """
    store = ReferenceStore.open(folder)
    report = VerifyReport(store.folder)
    _verify_text(store.folder / STORE_FILE, STORE_TEXT, report)
    names, digests = list_names(store.folder), store.digests()
    _note_strangers(store.folder, set(names) - {STORE_FILE, *digests}, report)
    for digest in digests:
        _verify_namespace(store, digest, report)
    return report


def _verify_namespace(store: ReferenceStore, digest: str, report: VerifyReport) -> None:
    """Verify the folder of a reference."""
    folder = store.folder / digest
    names = list_names(folder)
    segments = segment_names(names)
    _note_strangers(folder, set(names) - {IDENTITY_FILE, *segments}, report)
    if segments or IDENTITY_FILE in names:
        report.references += 1
        try:
            _verify_text(folder / IDENTITY_FILE, identity_text(store.identity(digest)), report)
        except ReferenceStoreError as error:
            report.faults.append(str(error))
    whole = []
    for name in segments:
        try:
            whole.append(_verify_segment(folder / name, bytes.fromhex(digest), report).columns)
        except ReferenceStoreError as error:
            if (folder / name).exists():  # otherwise a prune has deleted it since it was listed
                report.faults.append(str(error))
    report.faults += _conflicts(folder, whole)


def _verify_segment(path: Path, identity: bytes, report: VerifyReport) -> Segment:
    """Open a segment after comparing the checksums of the file and of each row.

    Raises:
        ReferenceStoreError: it is damaged, or can't be read.
    """
    with naming_errors("read", path):
        content = path.read_bytes()
    report.segments += 1
    report.bytes += len(content)
    if not is_named_by(path.name, content):
        raise damaged(path, "its bytes are not those that its name was made from")
    segment = Segment(path, identity)
    segment.check(np.arange(len(segment)))
    report.rows += len(segment)
    return segment


def _verify_text(path: Path, expected: str, report: VerifyReport) -> None:
    """Compare a JSON file with the only text that the store writes for its content."""
    with naming_errors("read", path):
        content = path.read_bytes()
    report.bytes += len(content)
    if content != expected.encode():
        report.faults.append(
            f"{path} is not as it was written, though what it says is the same: replace its "
            f"content by {expected!r}."
        )


def _note_strangers(folder: Path, names: set[str], report: VerifyReport) -> None:
    """Report files that don't belong to the store.

    Args:
        folder: folder that the files are in.
        names: names that are neither segments nor JSON files of the store. They must come from the
            listing in which the segments were found; in a later listing, a segment that was written
            in between would look like a stranger.
        report: gets a note or a fault for each file.
    """
    for name in sorted(names):
        path = folder / name
        if name.startswith(TEMPORARY_PREFIX):
            report.notes.append(
                f"{path} was not written to its end; no reader looks at it. Delete it when no "
                "build is running."
            )
        elif name.endswith(".arrow"):
            report.faults.append(
                f"{path} has a name that no segment has, so its rows are not read: give it its "
                "own name back, or delete it; its rows are scored again by the next build."
            )
        else:
            report.notes.append(f"{path} does not belong to the store.")


def _conflicts(folder: Path, parts: list[Columns]) -> list[str]:
    """Find answers with several rows whose log-probs differ by more than rounding explains.

    Args:
        folder: folder of the reference, named in the result.
        parts: columns of all its undamaged segments.

    Returns:
        A sentence with the number of such answers and the first of them; empty if there are none.
    """
    if not parts:
        return []
    keys = np.concatenate([part.keys for part in parts])
    logps = np.concatenate([part.logps for part in parts])
    num_tokens = np.concatenate([part.num_tokens for part in parts])
    first, inverse = unique_keys(keys)
    apart = np.abs(logps - logps[first][inverse]) > CONFLICT_TOLERANCE * np.maximum(num_tokens, 1)
    rows = np.flatnonzero(apart | (num_tokens != num_tokens[first][inverse]))
    if not len(rows):
        return []
    row = int(rows[0])
    # Answers are counted, not rows: which of a key's rows comes first, and so how many rows differ
    # from it, depends on the segments' random names.
    count = len(np.unique(inverse[rows]))
    return [
        f"{folder} holds {count} rows twice with different log-probs, the first is "
        f"{keys[row].tobytes().hex()} ({logps[first][inverse][row]:.6g} and {logps[row]:.6g}): the "
        "reference changed under one identity, or a machine computes wrongly; delete that folder, "
        "its rows are scored again by the next build."
    ]
