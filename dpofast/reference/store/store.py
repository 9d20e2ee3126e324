"""Reference log-probs on disk: a folder, in it one folder for each reference, in that segments.

The store knows bytes and keys alone, neither models nor data. Segments are never changed; any
number of processes add their own, and readers see whole ones only.
"""

from __future__ import annotations

import json
from pathlib import Path

from dpofast.errors import ReferenceStoreError
from dpofast.reference.identity.description import DIGEST_CHARS, ReferenceIdentity
from dpofast.reference.store.files import (
    TEMPORARY_PREFIX,
    list_names,
    make_folder,
    naming_errors,
    write_durably,
)
from dpofast.reference.store.format import FORMAT_NAME, IDENTITY_FILE, STORE_FILE, STORE_TEXT
from dpofast.reference.store.namespace import Namespace
from dpofast.reference.store.segments import FORMAT_VERSION


class ReferenceStore:
    """A folder of reference log-probs; made by `ReferenceStore.open`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def open(cls, folder: str | Path, create: bool = False) -> ReferenceStore:
        """Open a store.

        Args:
            folder: of the store.
            create: make it where there is none; the folder must be empty then.

        Raises:
            ReferenceStoreError: no store is there, something else is, or one of another version.
        """
        folder = Path(folder).expanduser()
        path = folder / STORE_FILE
        with naming_errors("read", path):
            exists = path.exists()
        if not exists:
            _refuse_foreign(folder)
            if not create:
                raise ReferenceStoreError(
                    f"There is no reference store in {folder}: check the path, or make one with "
                    "`dpofast ref build`."
                )
            make_folder(folder)
            write_durably(path, STORE_TEXT.encode())
        _check_version(path)
        return cls(folder)

    def namespace(self, identity: ReferenceIdentity) -> Namespace:
        """The rows of one reference; its folder is made when the first is written."""
        return Namespace(self.folder, identity)

    def digests(self) -> list[str]:
        """Of the references that have a folder here, sorted."""
        hexadecimal = set("0123456789abcdef")
        return [
            name
            for name in list_names(self.folder)
            if len(name) == DIGEST_CHARS and set(name) <= hexadecimal
        ]

    def identity(self, digest: str) -> ReferenceIdentity:
        """What a folder's identity.json says.

        Raises:
            ReferenceStoreError: it lacks or is damaged.
        """
        path = self.folder / digest / IDENTITY_FILE
        with naming_errors("read", path):
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                identity = ReferenceIdentity(content["digest"], content["description"])
            except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
                raise ReferenceStoreError(
                    f"{path} can't be read ({error}): delete that folder, its rows are scored "
                    "again by the next build; or delete this file alone, and the next build of "
                    "that reference writes it anew."
                ) from error
        if identity.digest != digest:
            raise ReferenceStoreError(
                f"{path} describes the reference {identity.digest}, not its folder's: give the "
                "folder its own name back, or delete it."
            )
        return identity


def _refuse_foreign(folder: Path) -> None:
    """Raise ReferenceStoreError at a folder without store.json that holds something else."""
    names = [name for name in list_names(folder) if not name.startswith(TEMPORARY_PREFIX)]
    # Another process may be making this very store: then its first file is there by now.
    if names and not (folder / STORE_FILE).exists():
        raise ReferenceStoreError(
            f"{folder} is not a reference store: it holds {names[0]!r} but no {STORE_FILE}; choose "
            "an empty or new folder for the store."
        )


def _check_version(path: Path) -> None:
    with naming_errors("read", path):
        text = path.read_bytes()
    try:
        content = json.loads(text)
        name, version = content["format"], content["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ReferenceStoreError(
            f"{path} is damaged ({error}): if the folder is a reference store, replace this file "
            f"by {STORE_TEXT!r}; otherwise choose another folder."
        ) from error
    if name != FORMAT_NAME or version != FORMAT_VERSION:
        raise ReferenceStoreError(
            f"{path} says {name!r} version {version!r}, and this dpofast reads version "
            f"{FORMAT_VERSION}: use the dpofast that wrote it, or choose another folder, or delete "
            "this one (its rows are then scored again)."
        )
