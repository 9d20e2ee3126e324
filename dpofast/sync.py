"""Waits until what was written has reached the disk."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk.

    A name survives a power loss only if its folder was flushed, too: flushing the file doesn't
    include it.

    Raises:
        OSError: the path can't be opened or flushed.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
