"""What stands in a store, in words, and whether every byte of it is as it was written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_128_hexdigest

from dpofast.errors import ReferenceStoreError
from dpofast.reference.store.files import TEMPORARY_PREFIX, list_names, naming_errors
from dpofast.reference.store.format import IDENTITY_FILE, STORE_FILE, STORE_TEXT, identity_text
from dpofast.reference.store.keys import unique_keys
from dpofast.reference.store.namespace import Namespace
from dpofast.reference.store.row_detail import RowDetail
from dpofast.reference.store.segments import (
    FORMAT_VERSION,
    NAME_PATTERN,
    Columns,
    Segment,
    damaged,
)
from dpofast.reference.store.store import ReferenceStore
from dpofast.reference.store.text import human_bytes, printable, reference_words

# Nats per token by which two scorings of one answer may differ: what batching does in bfloat16.
CONFLICT_TOLERANCE = 0.05


@dataclass
class VerifyReport:
    """What `verify` read and what it found.

    Attributes:
        problems: sentences, each with a file and the remedy; empty where all is well.
        notes: what is no damage but worth knowing.
    """

    folder: Path
    references: int = 0
    segments: int = 0
    rows: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def lines(self) -> list[str]:
        verdict = "all as it was written" if self.ok else f"{len(self.problems)} problems"
        lines = [
            f"{self.folder}: {_count(self.rows, 'row')} of "
            f"{_count(self.references, 'reference')} in "
            f"{_count(self.segments, 'segment')}, {human_bytes(self.bytes)} read: {verdict}",
            *self.problems,
            *(f"Note: {note}" for note in self.notes),
        ]
        return [printable(line) for line in lines]


def verify(folder: str | Path) -> VerifyReport:
    """Read every byte of a store and compare it with its checksums; nothing is changed.

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
    folder = store.folder / digest
    names = list_names(folder)
    segments = [name for name in names if NAME_PATTERN.fullmatch(name)]
    _note_strangers(folder, set(names) - {IDENTITY_FILE, *segments}, report)
    if segments or IDENTITY_FILE in names:
        report.references += 1
        try:
            _verify_text(folder / IDENTITY_FILE, identity_text(store.identity(digest)), report)
        except ReferenceStoreError as error:
            report.problems.append(str(error))
    whole = []
    for name in segments:
        try:
            whole.append(_verify_segment(folder / name, bytes.fromhex(digest), report).columns)
        except ReferenceStoreError as error:
            if (folder / name).exists():  # else a prune has merged it meanwhile
                report.problems.append(str(error))
    report.problems += _conflicts(folder, whole)


def _verify_segment(path: Path, identity: bytes, report: VerifyReport) -> Segment:
    with naming_errors("read", path):
        content = path.read_bytes()
    report.segments += 1
    report.bytes += len(content)
    match = NAME_PATTERN.fullmatch(path.name)
    assert match is not None
    if xxh3_128_hexdigest(content) != match["checksum"]:
        raise damaged(path, "its bytes are not those that its name stands for")
    segment = Segment(path, identity)
    segment.check(np.arange(len(segment)))
    report.rows += len(segment)
    return segment


def _verify_text(path: Path, expected: str, report: VerifyReport) -> None:
    with naming_errors("read", path):
        content = path.read_bytes()
    report.bytes += len(content)
    if content != expected.encode():
        report.problems.append(
            f"{path} is not as it was written, though what it says is the same: replace its "
            f"content by {expected!r}."
        )


def _note_strangers(folder: Path, names: set[str], report: VerifyReport) -> None:
    """Names of one listing: with a second one, what was written in between would be a stranger."""
    for name in sorted(names):
        path = folder / name
        if name.startswith(TEMPORARY_PREFIX):
            report.notes.append(
                f"{path} was not written to its end; no reader looks at it. Delete it when no "
                "build is running."
            )
        elif name.endswith(".arrow"):
            report.problems.append(
                f"{path} has a name that no segment has, so its rows are not read: give it its "
                "own name back, or delete it; its rows are scored again by the next build."
            )
        else:
            report.notes.append(f"{path} does not belong to the store.")


def _conflicts(folder: Path, parts: list[Columns]) -> list[str]:
    """Rows that stand in several segments with log-probs that rounding doesn't explain."""
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
    # answers, not rows: which of a key's rows comes first is up to the segments' random names
    count = len(np.unique(inverse[rows]))
    return [
        f"{folder} holds {count} rows twice with different log-probs, the first is "
        f"{keys[row].tobytes().hex()} ({logps[first][inverse][row]:.6g} and {logps[row]:.6g}): the "
        "reference changed under one identity, or a machine computes wrongly; delete that folder, "
        "its rows are scored again by the next build."
    ]


def info(folder: str | Path) -> dict[str, Any]:
    """What a store holds, for programs; `describe` says the same for people.

    Returns:
        folder, format_version, rows, bytes, and `references`: for each its digest, description,
        rows (each answer once), tokens of these answers, rows_with_logps and rows_with_logsumexps
        (of each token), segments, bytes, first_written and last_written (ISO 8601, UTC).

    Raises:
        ReferenceStoreError: the folder isn't a store, or is damaged.
    """
    store = ReferenceStore.open(folder)
    references = []
    for digest in store.digests():
        names = [n for n in list_names(store.folder / digest) if NAME_PATTERN.fullmatch(n)]
        if not names:
            continue
        identity = store.identity(digest)
        namespace = Namespace(store.folder, identity)
        stats = _stats([namespace.folder / name for name in names])
        if not stats:
            continue
        times = sorted(stat.st_mtime for stat in stats)
        counts = namespace.counts()
        references.append(
            {
                "digest": digest,
                "description": identity.description,
                "rows": counts.rows,
                "tokens": counts.tokens,
                "rows_with_logps": counts.of_detail[RowDetail.LOGPS],
                "rows_with_logsumexps": counts.of_detail[RowDetail.LOGSUMEXPS],
                "segments": len(stats),
                "bytes": sum(stat.st_size for stat in stats),
                "first_written": _iso(times[0]),
                "last_written": _iso(times[-1]),
            }
        )
    return {
        "folder": str(store.folder),
        "format_version": FORMAT_VERSION,
        "rows": sum(reference["rows"] for reference in references),
        "bytes": sum(reference["bytes"] for reference in references),
        "references": references,
    }


def _stats(paths: Sequence[Path]) -> list[os.stat_result]:
    """Of the files that a prune hasn't merged meanwhile."""
    stats = []
    for path in paths:
        with naming_errors("read", path), contextlib.suppress(FileNotFoundError):
            stats.append(path.stat())
    return stats


def describe(folder: str | Path) -> list[str]:
    """Lines for people: what a store holds and what its references are made of.

    Raises:
        ReferenceStoreError: the folder isn't a store, or is damaged.
    """
    content = info(folder)
    references = content["references"]
    lines = [
        f"{printable(content['folder'])}: {_count(content['rows'], 'row')} of "
        f"{_count(len(references), 'reference')}, {human_bytes(content['bytes'])} "
        f"(format version {content['format_version']})"
    ]
    for reference in references:
        rows, size = reference["rows"], reference["bytes"]
        lines += [
            "",
            reference["digest"],
            f"  rows: {_count(rows, 'answer')} of {_count(reference['tokens'], 'token')} in "
            f"{_count(reference['segments'], 'segment')}, {human_bytes(size)}, "
            f"{human_bytes(round(size / rows))} a row",
            f"  stored: summed log-probs of all rows, per-token log-probs of "
            f"{_share(reference['rows_with_logps'], rows)}, log-sum-exps of "
            f"{_share(reference['rows_with_logsumexps'], rows)}",
            f"  written: {reference['first_written']} to {reference['last_written']}",
            *(f"  {line}" for line in reference_words(reference["description"])),
        ]
    return lines


def _count(number: int, noun: str) -> str:
    return f"1 {noun}" if number == 1 else f"{number:,} {noun}s"


def _share(count: int, rows: int) -> str:
    return {0: "none", rows: "all"}.get(count, f"{count:,}")


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
