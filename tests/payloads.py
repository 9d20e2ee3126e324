"""Pickles that would run code if they were read: they make a folder, which tests look for."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dpofast.train.checkpoint.manifest import MANIFEST_FILE, FileRecord, Manifest, hash_files


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path, function: Callable[..., Any] = os.mkdir) -> None:
        self.marker, self.function = str(marker), function

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        if self.function is exec:
            return exec, (f"import os; os.mkdir({self.marker!r})",)
        return self.function, (self.marker,)


class Honest:
    """A class that DeepSpeed doesn't need, without bad intentions."""


def plant(file: Path, item: Any) -> None:
    """Add an object to a file of `torch.save` that holds a dict."""
    content = torch.load(file, weights_only=False)
    torch.save({**content, "planted": item}, file)


def rewrite_manifest(checkpoint: Path) -> None:
    """Make the manifest match the files, as somebody who plants a payload would."""
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    names = [
        path.relative_to(checkpoint).as_posix() for path in files if path.name != MANIFEST_FILE
    ]
    records = {n: r for n, r in hash_files(checkpoint, names).items() if isinstance(r, FileRecord)}
    replace(Manifest.read(checkpoint), files=records).write(checkpoint)


def write_legacy(file: Path, item: Any) -> None:
    """Write in the format that PyTorch had before its zip files."""
    torch.save({"planted": item}, file, _use_new_zipfile_serialization=False)


def write_new_protocol(file: Path, item: Any) -> None:
    torch.save({"planted": item}, file, pickle_protocol=5)


def write_bare(file: Path, item: Any) -> None:
    """Write a pickle without anything of PyTorch around it."""
    file.write_bytes(pickle.dumps({"planted": item}, protocol=2))


def write_tar(file: Path, item: Any) -> None:
    """Write in the oldest format: a tar archive of several pickles."""
    with tarfile.open(file, "w:", format=tarfile.PAX_FORMAT) as archive:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps(item, protocol=2)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


FORMATS = {
    "legacy": write_legacy,
    "protocol 5": write_new_protocol,
    "bare": write_bare,
    "tar": write_tar,
}
