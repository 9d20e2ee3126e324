"""Which split a file holds, by its name."""

from __future__ import annotations

import re
from pathlib import PurePath

from dpofast.errors import DataError

# Words in the names of files and folders that say which split they hold.
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
    """train, test or validation, where the file's name or a folder of `path` says so."""
    for part in reversed(path.parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return None


def same_split(found: str | None, wanted: str) -> bool:
    """Whether `wanted`, as a user writes it, is the split `found`."""
    return found is not None and found == _SPLIT_WORDS.get(wanted, wanted)


def check_whole_file(path: PurePath, split: str | None) -> None:
    """A file without splits is the training data, unless its name says otherwise.

    Otherwise a test split of it would silently be the training pairs.

    Raises:
        DataError: another split is asked for.
    """
    if split in (None, "train") or same_split(split_in_name(PurePath(path.name)), split):
        return
    raise DataError(
        f"{path} is one file without a split {split!r}; name the file that holds it instead"
    )
