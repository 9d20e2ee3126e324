"""Failed writes in words: what the disk said, and what room there is."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dpofast.errors import ModelError, one_line

# A full disk or quota, one that can't be written, and one that is broken or gone.
DISK_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ESTALE,
}
# How safetensors gives the system's number, and PyTorch its text.
_NUMBER = re.compile(r"\(os error (\d+)\)|\bcode: (\d+)")
_TEXT = re.compile(r"failed with strerror: (.+)|write\(\): fd \d+ failed with (.+)")
# PyTorch's zip writer keeps no reason at all.
_NO_REASON = ("PytorchStreamWriter", "iostream error", "inline_container.cc")
PROBE_BYTES = 1 << 20


def failed_write(error: BaseException | None, folder: str | Path) -> str | None:
    """Why a file couldn't be written, in the system's words; None if this is another error.

    Args:
        error: what was raised by open, torch.save, safetensors, or by code that has called them.
        folder: an existing folder on the disk, in which a write is tried if the error doesn't tell.
    """
    if error is None:
        return None
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return os.strerror(error.errno)
    text = str(error)
    if type(error).__name__ == "SafetensorError" and (number := _NUMBER.search(text)):
        return os.strerror(int(number[1] or number[2]))
    if isinstance(error, RuntimeError):
        if said := _TEXT.search(text):
            return one_line(Exception(said[1] or said[2]))
        if any(words in text for words in _NO_REASON):
            return _tried(Path(folder)) or "PyTorch's write was cut short"
    return failed_write(error.__cause__ or error.__context__, folder)


def release_files(error: BaseException | None) -> None:
    """Close the files that the frames of an error still hold open, whose room isn't free till then.

    Args:
        error: what a failed write has raised.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def room(folder: str | Path, needed: int | None) -> str:
    """What a save needs and what the disk has, in bytes, as the part of a sentence.

    Args:
        folder: an existing folder on the disk.
        needed: bytes of the save; None if that isn't known.
    """
    try:
        free = f"{free_bytes(folder):,} bytes are free"
    except OSError as error:
        free = f"the disk doesn't say what is free: {error.strerror}"
    return free if needed is None else f"a save takes about {needed:,} bytes, and {free}"


@contextmanager
def exporting(folder: str | Path, needed: int | None) -> Iterator[None]:
    """Turn a failed write of the exported model into an error that says why.

    Args:
        folder: folder of the model.
        needed: bytes of the model; None if that isn't known.

    Raises:
        ModelError: the model can't be written.
    """
    try:
        yield
    except Exception as error:
        reason = failed_write(error, folder)
        if reason is None:
            raise
        release_files(error)
        raise ModelError(
            f"The model can't be written to {str(folder)!r}: {reason} ({room(folder, needed)}); "
            "make room there and save it again, which a finished run does if it is started with "
            "resume_from_checkpoint: true."
        ) from error


def free_bytes(folder: str | Path) -> int:
    """The bytes that this user can still write to the disk of a folder."""
    return shutil.disk_usage(folder).free


def _tried(folder: Path) -> str | None:
    """The reason why a file can't be written to a folder now; None if it can."""
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            block = memoryview(bytes(PROBE_BYTES))
            while block:
                block = block[file.write(block) :]
    except OSError as error:
        return error.strerror
    return None
