"""Names that may be published: hub ids, and file names without their folders or their users."""

from __future__ import annotations

import getpass
import platform
import re
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

# A file of Hugging Face's cache, or an address of one on the hub.
_CACHED = re.compile(r"(?:models|datasets)--([\w.-]+?)(?:--([\w.-]+))?/snapshots/")
_ADDRESS = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+|[\w.-]+)@")
_DATA_FILE = re.compile(r"\.(jsonl?|parquet|arrow|csv|gz|zst|zip|txt)$", re.IGNORECASE)
_SHORTEST_USER = 3  # letters; shorter names occur in too many words


def hub_id(name: str | None) -> str | None:
    """The id of a model or dataset on the Hugging Face Hub; None for local files and folders.

    Args:
        name: a hub id; a path; or the address of a file on the hub or in its cache.
    """
    if not name:
        return None
    if found := _ADDRESS.match(name):
        return found.group(1)
    if found := _CACHED.search(f"{Path(name).as_posix()}/"):
        return "/".join(filter(None, found.groups()))
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if _DATA_FILE.search(name) or Path(name).exists() else name


def public_name(path: str | Path | None) -> str | None:
    """The last part of a path; None if it is empty or names the user or the computer."""
    name = Path(path).name if path else ""
    return None if not name or is_personal(name) else name


def is_personal(name: str) -> bool:
    """Whether a text contains the user's name or the computer's, as a word of its own."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = ""
    known = {user, Path("~").expanduser().name, platform.node(), platform.node().split(".")[0]}
    words = [re.escape(word) for word in known if len(word) >= _SHORTEST_USER]
    pattern = rf"(?<![a-z0-9])(?:{'|'.join(words)})(?![a-z0-9])"
    return bool(words and re.search(pattern, name, re.IGNORECASE))
