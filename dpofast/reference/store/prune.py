"""Makes a store smaller: merges segments, drops duplicate rows, and forgets references.

A segment is deleted only after its replacement is on the disk. A kill in between leaves duplicate
rows, but loses none.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dpofast.errors import ReferenceStoreError
from dpofast.reference.store.files import TEMPORARY_PREFIX, list_names, naming_errors
from dpofast.reference.store.keys import KEY_BYTES, KeyIndex
from dpofast.reference.store.segments import Columns, Segment, segment_names, write_segment
from dpofast.reference.store.store import ReferenceStore
from dpofast.reference.store.text import human_bytes
from dpofast.sync import sync

MERGED_BYTES = 1 << 28  # target size of a merged segment
ABANDONED_SECONDS = 86_400.0  # age of a temporary file that no writer can still be working on
SHORTEST_DIGEST = 6  # fewest characters by which a reference can be named


@dataclass
class PruneReport:
    """What `prune` did.

    Attributes:
        folder: folder of the store.
        references: number of references that were kept.
        forgotten: digests of the references that were deleted.
        duplicates: number of rows that were dropped because their answer has another row.
        segments_before: number of segments of the kept references before the prune.
        segments_after: number of these segments afterwards.
        temporaries: number of files of killed writers that were deleted.
        bytes_freed: bytes by which the store shrank; slightly below 0 if only headers grew.
    """

    folder: Path
    references: int = 0
    forgotten: list[str] = field(default_factory=list)
    duplicates: int = 0
    segments_before: int = 0
    segments_after: int = 0
    temporaries: int = 0
    bytes_freed: int = 0

    def lines(self) -> list[str]:
        """Write the report for people."""
        return [
            f"{self.folder}: {human_bytes(max(self.bytes_freed, 0))} freed",
            f"references: {self.references} kept, {len(self.forgotten)} deleted",
            f"rows that stood twice: {self.duplicates}",
            f"segments: {self.segments_before} before, {self.segments_after} now",
            f"files of killed writers: {self.temporaries} deleted",
        ]


def prune(folder: str | Path, forget: Sequence[str] = ()) -> PruneReport:
    """Merge small segments, drop duplicate rows, and delete the files of killed writers.

    Builds and runs on this machine can continue during a prune, because they can still read deleted
    files that they have mapped into memory. On a network file system, files that another machine
    has mapped would disappear while it uses them.

    Args:
        folder: folder of the store.
        forget: digests of references to delete with all their rows, or the first 6 or more
            characters of a digest. No run may be using these references.

    Raises:
        ReferenceStoreError: the folder isn't a store, a name in `forget` fits no reference or
            several, or a segment to merge is damaged. In the last case the references before the
            damaged one have been pruned, and its own rows are unchanged.
    """
    store = ReferenceStore.open(folder)
    digests = store.digests()
    forgotten = [_named(digests, name, store.folder) for name in dict.fromkeys(forget)]
    report = PruneReport(store.folder)
    before = _size(store.folder)
    for digest in dict.fromkeys(forgotten):
        with naming_errors("delete", store.folder / digest):
            # Renaming hides the reference at once. Otherwise a reader could find its folder half
            # deleted, with segments but no identity.json, which is an error.
            hidden = store.folder / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
            (store.folder / digest).rename(hidden)
            shutil.rmtree(hidden)
        report.forgotten.append(digest)
    for digest in digests:
        if digest not in forgotten:
            report.references += 1
            _delete_abandoned(store.folder / digest, report)
            _compact(store.folder / digest, bytes.fromhex(digest), report)
    _delete_abandoned(store.folder, report)
    report.bytes_freed = before - _size(store.folder)
    return report


def _named(digests: Sequence[str], name: str, folder: Path) -> str:
    """Find the only digest that begins with `name`, or raise ReferenceStoreError."""
    fits = [digest for digest in digests if digest.startswith(name)]
    if len(name) < SHORTEST_DIGEST or len(fits) != 1:
        raise ReferenceStoreError(
            f"{name!r} names {len(fits)} references of {folder}; give the first {SHORTEST_DIGEST} "
            "characters or more of a digest that `dpofast ref info` shows."
        )
    return fits[0]


def _compact(folder: Path, identity: bytes, report: PruneReport) -> None:
    """Merge the segments of a reference and drop its duplicate rows."""
    names = segment_names(list_names(folder))
    report.segments_before += len(names)
    segments = [Segment(folder / name, identity) for name in names]
    merged, kept = _to_merge(segments, report)
    for segment, rows in merged:  # before anything is written, so that an error changes nothing
        segment.check(rows)
    num_new = 0
    for columns in _gathered(merged):
        write_segment(folder, identity, columns, rank=0)
        num_new += 1
    for segment, _ in merged:
        with naming_errors("delete", segment.path):
            segment.path.unlink(missing_ok=True)  # another `prune` may have been faster
    if merged:
        with naming_errors("write", folder):
            sync(folder)
    report.segments_after += kept + num_new


def _to_merge(
    segments: Sequence[Segment], report: PruneReport
) -> tuple[list[tuple[Segment, np.ndarray]], int]:
    """Choose the segments to replace.

    For each key, the row with the highest detail is kept. Large segments without duplicates aren't
    replaced, so that a growing store isn't written anew by each prune.

    Returns:
        Segments to replace with their rows to keep, and the number of segments that stay.
    """
    sizes = {segment.path: int(segment.columns.row_bytes.sum()) for segment in segments}
    # Among rows of equal detail the index finds the first. With large segments first, duplicates
    # are dropped from small ones, and a large segment more often stays as it is.
    largest_first = sorted(segments, key=lambda s: (-sizes[s.path], s.path.name))
    keys = np.concatenate([np.empty((0, KEY_BYTES), np.uint8), *_columns(largest_first, "keys")])
    details = np.concatenate([np.empty(0, np.int8), *_columns(largest_first, "details")])
    is_kept = KeyIndex(keys, details).find(keys) == np.arange(len(keys))
    replaced, kept, start = [], 0, 0
    for segment in largest_first:
        rows = np.flatnonzero(is_kept[start : start + len(segment)])
        start += len(segment)
        report.duplicates += len(segment) - len(rows)
        if sizes[segment.path] >= MERGED_BYTES // 2 and len(rows) == len(segment):
            kept += 1
        else:
            replaced.append((segment, rows))
    if len(replaced) == 1 and len(replaced[0][1]) == len(replaced[0][0]):
        return [], kept + 1  # a single segment without duplicates would only be written again
    return replaced, kept


def _columns(segments: Sequence[Segment], name: str) -> list[np.ndarray]:
    """Return the named column of each segment."""
    return [getattr(segment.columns, name) for segment in segments]


def _gathered(merged: Sequence[tuple[Segment, np.ndarray]]) -> Iterator[Columns]:
    """Yield the rows to keep, in portions of about MERGED_BYTES."""
    parts: list[Columns] = []
    gathered = 0
    for segment, rows in merged:
        sizes = segment.columns.row_bytes[rows]
        # A segment above MERGED_BYTES is cut where its running size passes a multiple of that.
        cuts = np.flatnonzero(np.diff(np.cumsum(sizes) // MERGED_BYTES)) + 1
        portions = zip(np.split(rows, cuts), np.split(sizes, cuts), strict=True)
        for portion, size in ((portion, int(part.sum())) for portion, part in portions):
            if not size:
                continue
            if parts and gathered + size > MERGED_BYTES:
                yield Columns.concatenate(parts)
                parts, gathered = [], 0
            parts.append(segment.columns.take(portion))
            gathered += size
    if parts:
        yield Columns.concatenate(parts)


def _delete_abandoned(folder: Path, report: PruneReport) -> None:
    """Delete the temporary files in a folder that killed writers left behind."""
    for name in list_names(folder):
        path = folder / name
        if not name.startswith(TEMPORARY_PREFIX):
            continue
        with naming_errors("delete", path):
            try:
                age = time.time() - path.stat().st_mtime
                if path.is_dir():  # a reference whose prune was killed while forgetting it
                    shutil.rmtree(path)
                    report.temporaries += 1
                elif age > ABANDONED_SECONDS:
                    path.unlink()
                    report.temporaries += 1
            except FileNotFoundError:  # its writer has finished and renamed it
                continue


def _size(folder: Path) -> int:
    """Add up the bytes of all files in a store."""
    total = 0
    for path in folder.rglob("*"):
        with naming_errors("read", path):
            try:
                total += path.stat().st_size if path.is_file() else 0
            except FileNotFoundError:
                continue
    return total
