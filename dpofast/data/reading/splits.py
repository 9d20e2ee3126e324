"""Tells from a file's name which split it holds."""

from __future__ import annotations

import re
from pathlib import PurePath

from dpofast.errors import DataError

# Words in names of files and folders -> the split that they mean.
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "eval": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}


def split_in_name(path: PurePath) -> str | None:
    """The split that a path names: train, test or validation; None if it names none.

    The file's own name counts first, then its folder, then the folder above.
    """
    for part in reversed(path.parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return None


def same_split(found: str | None, wanted: str) -> bool:
    """Whether `found`, from `split_in_name`, is the split that a user calls `wanted`."""
    return found is not None and found == _SPLIT_WORDS.get(wanted, wanted)


def check_whole_file(path: PurePath, split: str | None) -> None:
    """Refuse to read a split from a single file that isn't divided into splits.

    The file counts as the split that its name contains, and also as training data. If every split
    could be read from it, a run would silently evaluate on its training pairs.

    Raises:
        DataError: the user asked for a split that is neither train nor in the file's name.
    """
    if split in (None, "train") or same_split(split_in_name(PurePath(path.name)), split):
        return
    raise DataError(
        f"{path} is one file without a split {split!r}; name the file that holds it instead"
    )
