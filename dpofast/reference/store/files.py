"""Files that stand whole or not at all, also after a crash or a power loss."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpofast.errors import ReferenceStoreError

# Readers ignore what begins like this; a killed writer may leave one behind.
TEMPORARY_PREFIX = ".tmp-"

_REMEDIES = {
    errno.ENOSPC: "make room and run again",
    errno.EDQUOT: "make room within the quota and run again",
    errno.EACCES: "check its permissions, or choose another folder for the store",
    errno.EPERM: "check its permissions, or choose another folder for the store",
    errno.EROFS: "choose a folder on a disk that can be written",
    errno.ENOTDIR: "choose a folder for the store, not a file",
    errno.EEXIST: "choose a folder for the store, not a file",
}


@contextlib.contextmanager
def naming_errors(action: str, path: Path) -> Iterator[None]:
    """Turn what the operating system reports into one sentence with the path and the remedy."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "see to the disk and run again")
        raise ReferenceStoreError(
            f"The reference store can't {action} {path} ({error.strerror or error}): {remedy}; "
            "what was committed before is kept."
        ) from error


def write_durably(path: Path, content: Any) -> None:
    """Write a file under a temporary name, flush it to the disk, and give it its name.

    When this returns the file survives a power loss. When it raises there is no new file `path`, or
    a whole one that a power loss may still take back.

    Raises:
        ReferenceStoreError: the disk is full, or can't be written.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
    with naming_errors("write", path):
        try:
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
            sync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it that lack, so that they survive a power loss."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with naming_errors("make", folder):
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            sync_folder(path.parent)
        if not missing:  # another process may have made it a moment ago
            sync_folder(folder.parent)
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def list_names(folder: Path) -> list[str]:
    """Names in a folder, sorted; none where it doesn't exist."""
    with naming_errors("list", folder):
        try:
            return sorted(os.listdir(folder))
        except FileNotFoundError:
            return []
