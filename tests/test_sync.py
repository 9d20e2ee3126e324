from __future__ import annotations

import os

import pytest

from dpofast.sync import sync


@pytest.fixture
def flushed(monkeypatch):
    """The files and folders that are flushed to the disk, by inode."""
    found = []
    fsync = os.fsync

    def noted(descriptor):
        found.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    return found


def test_files_and_folders_are_flushed(tmp_path, flushed):
    file = tmp_path / "file"
    file.write_text("content")
    for path in (file, tmp_path):
        before = len(os.listdir("/proc/self/fd"))
        sync(path)
        assert len(os.listdir("/proc/self/fd")) == before
    assert flushed == [file.stat().st_ino, tmp_path.stat().st_ino]


def test_a_disk_that_fails_is_an_error_and_leaves_nothing_open(tmp_path, monkeypatch):
    def broken(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="Input/output error"):
        sync(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "gone")
