"""Models a disk that loses power: records operations, and lists every state they can leave.

A file's content is safe once the file is fsynced. Before that it can be gone, cut off at any
multiple of 512 bytes, or zeros. A folder's entries are safe once the folder is fsynced. Changes of
entries since then reach the disk in their order, up to any one of them.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

SECTOR = 512


@dataclass
class Recorder:
    """Notes what the code under test asks of the disk.

    Attributes:
        operations: name, path and argument of each operation, in their order.
    """

    operations: list[tuple] = field(default_factory=list)

    def install(self, monkeypatch):
        for name in ("open", "rename", "mkdir", "unlink"):
            monkeypatch.setattr(Path, name, self._noting(getattr(Path, name), name))
        fsync = os.fsync

        def noted_fsync(descriptor):
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if os.path.isdir(path):
                self.operations.append(("sync folder", path, None))
            else:
                content = Path(path).read_bytes()
                self.operations.append(("write", path, content))
                self.operations.append(("sync", path, None))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", noted_fsync)

    def _noting(self, function, name):
        def noted(path, *arguments, **options):
            result = function(path, *arguments, **options)
            if name == "open" and "x" in str(arguments[:1]):
                self.operations.append(("create", str(path), None))
            elif name in ("mkdir", "unlink"):
                self.operations.append((name, str(path), None))
            elif name == "rename":
                self.operations.append((name, str(path), str(arguments[0])))
            return result

        return noted

    def acknowledge(self, keys):
        """Note that these rows were committed, so every later state must have them."""
        self.operations.append(("acknowledge", "", keys))


@dataclass
class State:
    """What is on the disk after a power loss.

    Attributes:
        files: content by path; None for a folder.
        acknowledged: keys of the rows that were committed before.
    """

    files: dict[str, bytes | None]
    acknowledged: list

    def write_to(self, root: Path, target: Path) -> None:
        for name, content in sorted(self.files.items()):
            path = target / Path(name).relative_to(root)
            if content is None:
                path.mkdir(parents=True, exist_ok=True)
            elif path.parent.exists():
                path.write_bytes(content)


def crash_states(operations: list[tuple], root: Path) -> Iterator[State]:
    """Yield every state that a power loss can leave, after any number of the operations."""
    for length in range(len(operations) + 1):
        yield from _after(operations[:length], root)


def _after(operations: list[tuple], root: Path) -> Iterator[State]:
    contents: dict[int, bytes] = {}  # by file, as last written
    unsynced: set[int] = set()
    here: dict[str, int | None] = {str(root): None}  # entries as the running system sees them
    safe = dict(here)
    pending: dict[str, list] = {}  # folder -> changes of its entries since its fsync
    acknowledged = []

    def change(path, number):
        pending.setdefault(os.path.dirname(path), []).append((path, number))

    for index, (name, path, more) in enumerate(operations):
        if name == "create":
            contents[index], here[path] = b"", index
            unsynced.add(index)
            change(path, index)
        elif name == "mkdir":
            here[path] = None
            change(path, None)
        elif name == "write":
            contents[here[path]] = more
            unsynced.add(here[path])
        elif name == "sync":
            unsynced.discard(here[path])
        elif name == "rename":
            here[more] = here.pop(path)
            change(more, here[more])
            change(path, "gone")
        elif name == "unlink":
            here.pop(path, None)
            change(path, "gone")
        elif name == "sync folder":
            _apply(safe, pending.pop(path, []))
        else:
            acknowledged += more
    orders = [range(len(changes) + 1) for changes in pending.values()]
    for counts in itertools.product(*orders):
        entries = dict(safe)
        for changes, count in zip(pending.values(), counts, strict=True):
            _apply(entries, changes[:count])
        reachable = {number for number in entries.values() if number is not None}
        for torn in _contents(contents, unsynced & reachable):
            files = {
                path: None if number is None else torn[number] for path, number in entries.items()
            }
            yield State(files, list(acknowledged))


def _apply(entries, changes):
    for path, number in changes:
        if number == "gone":
            entries.pop(path, None)
        else:
            entries[path] = number


def _contents(contents, unsynced):
    """Yield the contents that unsynced files can have: any number of sectors, or all zeros."""
    choices = []
    for number in sorted(unsynced):
        whole = contents[number]
        torn = [whole[:end] for end in range(0, len(whole), SECTOR)]
        choices.append([*torn, whole, bytes(len(whole))])
    for chosen in itertools.product(*choices):
        yield contents | dict(zip(sorted(unsynced), chosen, strict=True))
