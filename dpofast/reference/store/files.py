"""Writes files that are whole or absent, even after a crash or a power loss."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpofast.errors import ReferenceStoreError
from dpofast.sync import sync

# Prefix of the names of unfinished files. Readers ignore them; a killed writer leaves one behind.
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
    """Turn an error of the operating system into one sentence with the path and the remedy.

    Args:
        action: verb for the sentence, such as "read".
        path: file or folder that the error is about.

    Raises:
        ReferenceStoreError: the block raised an OSError.
    """
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "see to the disk and run again")
        raise ReferenceStoreError(
            f"The reference store can't {action} {path} ({error.strerror or error}): {remedy}; "
            "what was committed before is kept."
        ) from error


def write_durably(path: Path, content: Any) -> None:
    """Write a file so that it survives a power loss once this function returns.

    If it raises, `path` either wasn't written, or is whole but may not survive a power loss.

    Args:
        path: file to write.
        content: bytes or another buffer.

    Raises:
        ReferenceStoreError: the disk is full, or can't be written.
    """
    # Renaming is atomic, so no reader ever finds half of a file under its final name.
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
    with naming_errors("write", path):
        try:
            with temporary.open("xb") as file:
                # The content must be on the disk before the name is, or a power loss could leave
                # the name with an empty file.
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
            sync(path.parent)
        except BaseException:  # a KeyboardInterrupt too must leave no temporary file
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def make_folder(folder: Path) -> None:
    """Make a folder and its missing parents, so that they survive a power loss.

    Raises:
        ReferenceStoreError: the folder can't be made, or its path belongs to a file.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with naming_errors("make", folder):
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            sync(path.parent)
        if not missing:  # another process may have made it a moment ago, and not flushed it yet
            sync(folder.parent)
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))


def list_names(folder: Path) -> list[str]:
    """List the names in a folder, sorted; the list is empty if the folder doesn't exist.

    Raises:
        ReferenceStoreError: the folder can't be read.
    """
    with naming_errors("list", folder):
        try:
            return sorted(os.listdir(folder))
        except FileNotFoundError:
            return []
