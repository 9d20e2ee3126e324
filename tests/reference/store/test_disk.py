"""On a disk that loses power, is full or fails, no committed row is lost or changed."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from dpofast.errors import ReferenceStoreError
from dpofast.reference.store import prune as pruning
from dpofast.reference.store.prune import prune
from dpofast.reference.store.store import ReferenceStore
from dpofast.reference.store.verify import verify
from tests.reference.disk import Recorder, crash_states
from tests.reference.stubs import identity


def rows_of(seed, count):
    """Make log-probs by key, enough for a segment of a few sectors."""
    rng = np.random.default_rng(seed)
    return {
        rng.bytes(16): -rng.random(int(rng.integers(1, 90)), dtype=np.float32) for _ in range(count)
    }


def work(folder, rows, commits, acknowledge):
    """Let two writers commit in turn, with one row in common, and prune."""
    namespace = ReferenceStore.open(folder, create=True).namespace(identity())
    writers = [namespace.writer(rank) for rank in (0, 1)]
    items = list(rows.items())
    for part in range(commits):
        writer, keys = writers[part % 2], []
        for key, values in items[part::commits] + items[:1]:
            writer.add(key, values)
            keys.append(key)
        writer.commit()
        acknowledge(keys)
    prune(folder)


def assert_sound(folder, rows, acknowledged):
    """Assert that every acknowledged row is there, and that every row is right."""
    if not (folder / "store.json").exists():
        assert not acknowledged
        with pytest.raises(ReferenceStoreError, match="no reference store"):
            ReferenceStore.open(folder)
        return
    namespace = ReferenceStore.open(folder).namespace(identity())
    keys = list(rows)
    stored = namespace.read(keys)
    found = dict(zip(keys, stored.found.tolist(), strict=True))
    assert all(found[key] for key in acknowledged)
    for place, key in enumerate(keys):
        if found[key]:
            np.testing.assert_array_equal(stored.per_token_logps[place], rows[key])
            assert stored.logps[place] == rows[key].sum(dtype=np.float64)
    assert verify(folder).ok


def lose_power(tmp_path, monkeypatch, seeds):
    """Assert that every state after a power loss is sound; -> the number of states."""
    monkeypatch.setattr(pruning, "MERGED_BYTES", 1_000)  # a prune then writes several segments
    states = 0
    for seed in seeds:
        root, rows = tmp_path / f"disk{seed}", rows_of(seed, 12)
        root.mkdir()
        recorder = Recorder()
        with monkeypatch.context() as patched:
            recorder.install(patched)
            work(root / "a" / "store", rows, commits=3 + seed % 3, acknowledge=recorder.acknowledge)
        for state in crash_states(recorder.operations, root):
            target = tmp_path / "state"
            state.write_to(root, target)
            assert_sound(target / "a" / "store", rows, state.acknowledged)
            shutil.rmtree(target, ignore_errors=True)
            states += 1
    return states


def test_a_power_loss_loses_nothing_that_was_committed(tmp_path, monkeypatch):
    assert lose_power(tmp_path, monkeypatch, range(1)) > 100


@pytest.mark.torture
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_thousands_of_power_losses(tmp_path, monkeypatch):
    states = lose_power(tmp_path, monkeypatch, range(1, 40))
    print(f"{states} states after a power loss, all sound")
    assert states >= 5_000


def test_the_model_finds_a_writer_that_does_not_flush(tmp_path, monkeypatch):
    from dpofast.reference.store import files

    monkeypatch.setattr(files, "sync", lambda folder: None)
    with pytest.raises((AssertionError, ReferenceStoreError)):
        lose_power(tmp_path, monkeypatch, range(1))


class Failing:
    """Makes the operation with a given number fail, and all operations after it.

    Args:
        number: number of the operation among writes, fsyncs, renames, new files and new folders.
        code: error of the operating system.
        is_short: whether a failing write writes half of its content first.
    """

    def __init__(self, number, code, is_short):
        self.number, self.code, self.is_short = number, code, is_short
        self.count = 0

    def fails(self):
        self.count += 1
        return self.count > self.number

    def error(self, path):
        return OSError(self.code, os.strerror(self.code), str(path))

    def install(self, monkeypatch):
        opened, fsync = Path.open, os.fsync
        for name in ("rename", "mkdir"):
            monkeypatch.setattr(Path, name, self._failing(getattr(Path, name)))

        def failing_open(path, mode="r", *arguments, **options):
            if "x" not in mode:
                return opened(path, mode, *arguments, **options)
            if self.fails():
                raise self.error(path)
            return FailingFile(opened(path, mode, *arguments, **options), self)

        def failing_fsync(descriptor):
            if self.fails():
                raise self.error(os.readlink(f"/proc/self/fd/{descriptor}"))
            fsync(descriptor)

        monkeypatch.setattr(Path, "open", failing_open)
        monkeypatch.setattr(os, "fsync", failing_fsync)

    def _failing(self, function):
        def failing(path, *arguments, **options):
            if self.fails():
                raise self.error(path)
            return function(path, *arguments, **options)

        return failing


class FailingFile:
    def __init__(self, file, failing):
        self.file, self.failing = file, failing

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, content):
        if self.failing.fails():
            if self.failing.is_short:
                self.file.write(memoryview(content)[: len(content) // 2])
            raise self.failing.error(self.file.name)
        return self.file.write(content)


@pytest.mark.parametrize(("code", "is_short"), [(errno.ENOSPC, True), (errno.EIO, False)])
def test_a_disk_that_fails_at_any_operation(tmp_path, monkeypatch, code, is_short):
    rows = rows_of(3, 12)
    for number in range(1_000):
        folder, acknowledged = tmp_path / str(number) / "store", []
        failing = Failing(number, code, is_short)
        with monkeypatch.context() as patched:
            failing.install(patched)
            message = _message_of(work, folder, rows, 3, acknowledged.extend)
        if message is None:
            break
        assert os.strerror(code) in message
        assert str(folder.parent) in message
        assert_sound(folder, rows, acknowledged)  # the state so far is readable
        work(folder, rows, 3, acknowledged.extend)  # there is room again
        assert_sound(folder, rows, list(rows))
    assert number > 20


def _message_of(function, *arguments):
    """-> message of the ReferenceStoreError that a call raises; None if it raises nothing."""
    try:
        function(*arguments)
    except ReferenceStoreError as error:
        return str(error)
    return None
