"""The manifest of a checkpoint: what it consists of, so that any damage is noticed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from dpofast.sync import sync

MANIFEST_FILE = "dpofast_manifest.json"
FORMAT_VERSION = 1

# Fewer and larger reads than Python's own, and small enough for the processor's cache.
BLOCK_BYTES = 1 << 20
MOST_THREADS = 8


@dataclass(frozen=True)
class FileRecord:
    """What a file of a checkpoint must be.

    Attributes:
        size: bytes.
        xxh3_128: hash of the content, 32 hexadecimal digits.
    """

    size: int
    xxh3_128: str


@dataclass(frozen=True)
class Fault:
    """What is wrong with a file of a checkpoint.

    Attributes:
        file: its path inside the checkpoint.
        problem: a clause whose subject is the file: "is missing".
    """

    file: str
    problem: str

    def __str__(self) -> str:
        return f"{self.file} {self.problem}"


class ManifestError(ValueError):
    """A manifest that is missing or can't be trusted.

    Args:
        problem: a clause whose subject is the manifest: "is missing".
        is_missing: whether there is none at all.
    """

    def __init__(self, problem: str, is_missing: bool = False) -> None:
        super().__init__(f"{MANIFEST_FILE} {problem}")
        self.fault, self.is_missing = Fault(MANIFEST_FILE, problem), is_missing


@dataclass(frozen=True)
class Manifest:
    """The manifest of a checkpoint.

    Attributes:
        run_id: id of the run that saved it.
        step: optimizer steps of the run at the save.
        ranks: ranks that the run had.
        files: path of each file inside the checkpoint, with "/" between folders, and its record.
    """

    run_id: str
    step: int
    ranks: int
    files: dict[str, FileRecord]

    @property
    def has_training_state(self) -> bool:
        """Whether a run can go on from it; False for what save_only_model saved."""
        return any(Path(name).name.startswith("rng_state") for name in self.files)

    def text(self) -> str:
        """The content of the manifest's file, which ends with a digest of itself."""
        content: dict[str, Any] = {
            "format": FORMAT_VERSION,
            "run_id": self.run_id,
            "step": self.step,
            "ranks": self.ranks,
            "files": {name: asdict(self.files[name]) for name in sorted(self.files)},
        }
        return json.dumps({**content, "digest": _digest(content)}, indent=1) + "\n"

    def write(self, folder: Path) -> None:
        """Write the manifest into a checkpoint's folder, and on to the disk."""
        path = folder / MANIFEST_FILE
        path.write_text(self.text(), encoding="utf-8")
        sync(path)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of a checkpoint.

        Raises:
            ManifestError: it is missing or damaged, or a newer version wrote it.
        """
        try:
            written = (folder / MANIFEST_FILE).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise ManifestError("is missing", is_missing=True) from None
        except OSError as error:
            raise ManifestError(f"can't be read ({error.strerror})") from error
        try:
            content = json.loads(written)
            is_intact = content.pop("digest") == _digest(content)
            if is_intact and content["format"] > FORMAT_VERSION:
                raise ManifestError("was written by a newer version of dpofast")
            files = {name: FileRecord(**record) for name, record in content["files"].items()}
            if any(_is_outside(name) for name in files):
                raise ManifestError("names a file outside of the checkpoint")
            manifest = cls(content["run_id"], content["step"], content["ranks"], files)
            # Also notices what the digest doesn't cover, such as the spaces between values.
            is_own = manifest.text().encode() == written
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ManifestError):
                raise
            is_own = False
        if not is_own:
            raise ManifestError("is damaged, as it doesn't match its own digest")
        return manifest


def _is_outside(name: str) -> bool:
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts


def _digest(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content).encode())


def verify(folder: str | Path, hashes: bool = True) -> list[Fault]:
    """Compare a checkpoint with its manifest.

    Files that the manifest doesn't name are ignored: a converted checkpoint has some.

    Args:
        folder: the checkpoint.
        hashes: read the files and compare their hashes; otherwise only their sizes.

    Returns:
        What is wrong, a fault for each file; [] if the checkpoint is whole.
    """
    folder = Path(folder)
    try:
        records = Manifest.read(folder).files
    except ManifestError as error:
        return [error.fault]
    faults = {name: _size_fault(folder / name, record) for name, record in records.items()}
    if hashes:
        found = hash_files(folder, [name for name, fault in faults.items() if fault is None])
        for name, result in found.items():
            if isinstance(result, OSError):
                faults[name] = f"can't be read ({result.strerror})"
            elif result != records[name]:
                faults[name] = "has changed, as its checksum is another"
    return [Fault(name, problem) for name, problem in faults.items() if problem is not None]


def _size_fault(path: Path, record: FileRecord) -> str | None:
    try:
        size = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    except OSError as error:
        return f"can't be read ({error.strerror})"
    if not path.is_file():
        return "is no file"
    if size == record.size:
        return None
    if size == 0:
        return f"is empty instead of {record.size:,} bytes long"
    kind = "truncated to" if size < record.size else "longer than it was, at"
    return f"is {kind} {size:,} of {record.size:,} bytes"


def hash_files(
    folder: Path, names: Iterable[str], to_disk: bool = False
) -> dict[str, FileRecord | OSError]:
    """Size and hash of files, or the error with which they can't be read.

    Args:
        folder: the checkpoint.
        names: paths of the files inside it.
        to_disk: also make sure that the files have reached the disk.
    """

    def record(name: str) -> FileRecord | OSError:
        try:
            found = hash_file(folder / name)
            if to_disk:
                sync(folder / name)
        except OSError as error:
            return error
        return found

    names = list(names)
    # xxhash and reads release the interpreter's lock, so that threads help.
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(record, names), strict=True))


def hash_file(path: Path) -> FileRecord:
    """Size and hash of a file."""
    state, size = xxhash.xxh3_128(), 0
    block = memoryview(bytearray(BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            state.update(block[:count])
            size += count
    return FileRecord(size, state.hexdigest())
