"""Failed writes of PyTorch, safetensors and Python are recognised, on a disk that is full."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dpofast.errors import ModelError
from dpofast.train.checkpoint.space import exporting, failed_write, release_files, room
from tests.train.small_disk import make_read_only, small_disk

SIZE = 1 << 20
WRITES = {
    "safetensors": lambda path: save_file({"a": torch.zeros(SIZE)}, path),
    "torch": lambda path: torch.save({"a": torch.zeros(SIZE)}, path),
    "torch, old format": lambda path: torch.save(
        {"a": torch.zeros(SIZE)}, path, _use_new_zipfile_serialization=False
    ),
    "text": lambda path: Path(path).write_text("x" * 4 * SIZE),
}


def error_of(write, path):
    with pytest.raises(Exception) as caught:  # noqa: PT011  (each library has its own)
        write(path)
    return caught.value


@pytest.mark.parametrize("name", WRITES)
def test_a_full_disk_and_one_that_cannot_be_written(tmp_path, name):
    with small_disk(tmp_path / "disk", 2 * SIZE) as disk:
        error = error_of(WRITES[name], disk / "file")
        assert failed_write(error, disk) == os.strerror(errno.ENOSPC)
        wrapped = ValueError("somewhere above")
        wrapped.__cause__ = error
        assert failed_write(wrapped, disk) == os.strerror(errno.ENOSPC)
        release_files(error)
        for left in disk.iterdir():
            left.unlink()
        assert (
            room(disk, 5000) == f"a save takes about 5,000 bytes, and {2 * SIZE:,} bytes are free"
        )
        make_read_only(disk)
        error = error_of(WRITES[name], disk / "file")
        assert failed_write(error, disk) == os.strerror(errno.EROFS)


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EACCES, errno.EIO, errno.EFBIG])
def test_other_reasons(tmp_path, number):
    reason = os.strerror(number)
    assert failed_write(OSError(number, reason, "file"), tmp_path) == reason
    pytorchs = RuntimeError(
        "[enforce fail at inline_container.cc:747] . open file failed with strerror: " + reason
    )
    assert failed_write(pytorchs, tmp_path) == reason


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access"),
        ValueError("no space left in this argument"),
        FileNotFoundError(errno.ENOENT, "No such file", "config.json"),
        None,
    ],
)
def test_other_errors_stay_what_they_are(tmp_path, error):
    assert failed_write(error, tmp_path) is None


def test_a_failed_export_is_one_sentence(tmp_path):
    with (
        small_disk(tmp_path / "disk", SIZE) as disk,
        pytest.raises(ModelError) as caught,
        exporting(disk, 4 * SIZE),
    ):
        WRITES["safetensors"](disk / "model.safetensors")
    assert str(caught.value).startswith(
        f"The model can't be written to {str(disk)!r}: No space left on device (a save takes about "
        f"{4 * SIZE:,} bytes, and "
    )
    with pytest.raises(KeyError), exporting(tmp_path, None):
        raise KeyError
