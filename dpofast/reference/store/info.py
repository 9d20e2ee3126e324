"""Lists what a store holds, as figures for programs and as lines for people."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dpofast.counted import counted
from dpofast.reference.identity.readable import printable, readable_lines
from dpofast.reference.store.files import list_names, naming_errors
from dpofast.reference.store.format import FORMAT_VERSION
from dpofast.reference.store.namespace import Namespace
from dpofast.reference.store.row_detail import RowDetail
from dpofast.reference.store.segments import segment_names
from dpofast.reference.store.store import ReferenceStore
from dpofast.reference.store.text import human_bytes


def info(folder: str | Path) -> dict[str, Any]:
    """Count what a store holds. `describe` writes the same for people.

    Args:
        folder: folder of the store.

    Returns:
        A dict with folder, format_version, rows, bytes, and a list `references`. Each reference is
        a dict with its digest, description, rows (each answer counted once), tokens (in these
        answers), rows_with_logps and rows_with_logsumexps (rows that store them per token),
        segments, bytes, first_written and last_written (ISO 8601, UTC).

    Raises:
        ReferenceStoreError: the folder isn't a store, or is damaged.
    """
    store = ReferenceStore.open(folder)
    references = []
    for digest in store.digests():
        names = segment_names(list_names(store.folder / digest))
        if not names:  # a writer was made, and has committed nothing
            continue
        identity = store.identity(digest)
        namespace = Namespace(store.folder, identity)
        stats = _stats([namespace.folder / name for name in names])
        if not stats:  # a prune has deleted them all since they were listed
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
    """Get the sizes and times of segments, leaving out those that a prune has deleted by now."""
    stats = []
    for path in paths:
        with naming_errors("read", path), contextlib.suppress(FileNotFoundError):
            stats.append(path.stat())
    return stats


def describe(folder: str | Path) -> list[str]:
    """Describe a store and its references in lines for people.

    Args:
        folder: folder of the store.

    Raises:
        ReferenceStoreError: the folder isn't a store, or is damaged.
    """
    content = info(folder)
    references = content["references"]
    lines = [
        f"{printable(content['folder'])}: {counted(content['rows'], 'row')} of "
        f"{counted(len(references), 'reference')}, {human_bytes(content['bytes'])} "
        f"(format version {content['format_version']})"
    ]
    for reference in references:
        rows, size = reference["rows"], reference["bytes"]
        lines += [
            "",
            reference["digest"],
            f"  rows: {counted(rows, 'answer')} of {counted(reference['tokens'], 'token')} in "
            f"{counted(reference['segments'], 'segment')}, {human_bytes(size)}, "
            f"{human_bytes(round(size / rows))} a row",
            f"  stored: summed log-probs of all rows, per-token log-probs of "
            f"{_share(reference['rows_with_logps'], rows)}, log-sum-exps of "
            f"{_share(reference['rows_with_logsumexps'], rows)}",
            f"  written: {reference['first_written']} to {reference['last_written']}",
            *(f"  {line}" for line in readable_lines(reference["description"])),
        ]
    return lines


def _share(count: int, rows: int) -> str:
    """Write how many of the rows it is: "none", "all", or the number."""
    return {0: "none", rows: "all"}.get(count, f"{count:,}")


def _iso(seconds: float) -> str:
    """Write a time in seconds since 1970 as ISO 8601 in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
