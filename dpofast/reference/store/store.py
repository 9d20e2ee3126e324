"""The reference store: a folder with a subfolder for each reference, which holds its segments.

Segments are never changed. Any number of processes can add segments at the same time, and readers
only ever see whole ones.
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
from dpofast.reference.store.format import (
    FORMAT_NAME,
    FORMAT_VERSION,
    IDENTITY_FILE,
    STORE_FILE,
    STORE_TEXT,
)
from dpofast.reference.store.namespace import Namespace


class ReferenceStore:
    """A folder of reference log-probs; `ReferenceStore.open` checks that a folder is a store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def open(cls, folder: str | Path, create: bool = False) -> ReferenceStore:
        """Open a store.

        Args:
            folder: folder of the store.
            create: whether to make a store if there is none. The folder must then be empty or new.

        Raises:
            ReferenceStoreError: the folder has no store, has something else in it, or has a store
                of another version.
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
        """Open the rows of one reference; there needn't be any rows yet."""
        return Namespace(self.folder, identity)

    def digests(self) -> list[str]:
        """List the digests of the references that have a folder here, sorted."""
        # Other names are the store's own files, temporary ones, or strangers.
        hexadecimal = set("0123456789abcdef")
        return [
            name
            for name in list_names(self.folder)
            if len(name) == DIGEST_CHARS and set(name) <= hexadecimal
        ]

    def identity(self, digest: str) -> ReferenceIdentity:
        """Read the identity.json of a reference.

        Args:
            digest: name of the reference's folder.

        Raises:
            ReferenceStoreError: the file is missing or damaged, or describes another reference.
        """
        path = self.folder / digest / IDENTITY_FILE
        with naming_errors("read", path):
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                identity = ReferenceIdentity(content["digest"], content["description"])
            # ReferenceIdentity refuses a digest that isn't its description's, with a ValueError.
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
    """Raise ReferenceStoreError if a folder without a store.json contains other files."""
    names = [name for name in list_names(folder) if not name.startswith(TEMPORARY_PREFIX)]
    # Another process may be making this store right now, so store.json is looked for again. A store
    # gets its store.json before any other file, so other files without it are foreign.
    if names and not (folder / STORE_FILE).exists():
        raise ReferenceStoreError(
            f"{folder} is not a reference store: it holds {names[0]!r} but no {STORE_FILE}; choose "
            "an empty or new folder for the store."
        )


def _check_version(path: Path) -> None:
    """Raise ReferenceStoreError unless a store.json says the version that this code reads."""
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
