"""Rows are found by their keys, and read as they were written or not at all."""

from __future__ import annotations

import errno
import itertools
import os
import time

import numpy as np
import pyarrow as pa
import pytest

from dpofast.errors import ReferenceStoreError
from dpofast.reference.store import files
from dpofast.reference.store.row_detail import RowDetail
from dpofast.reference.store.store import ReferenceStore
from tests.reference.stubs import KEYS, ROWS, identity, scores_of, write


@pytest.mark.parametrize("commits", [1, 3, 12])
def test_rows_come_back_as_they_were_written(tmp_path, commits):
    write(tmp_path, commits=commits)
    namespace = ReferenceStore.open(tmp_path).namespace(identity())
    keys = [*reversed(ROWS), b"n" * 16, bytes([3] * 16)]
    rows = namespace.read(keys)
    logps, found = namespace.lookup(keys)
    np.testing.assert_array_equal(found, [True] * 12 + [False, True])
    np.testing.assert_array_equal(rows.found, found)
    np.testing.assert_array_equal(namespace.contains(keys), found)
    assert np.isnan(logps[12])
    for place, key in enumerate(keys):
        values = ROWS.get(key, np.empty(0, np.float32))
        np.testing.assert_array_equal(rows.per_token_logps[place], values)
        assert rows.num_tokens[place] == len(values)
        if found[place]:
            assert logps[place] == rows.logps[place] == values.sum(dtype=np.float64)
    assert len(namespace) == namespace.num_unique_rows() == 12


@pytest.mark.parametrize("order", list(itertools.permutations(RowDetail)))
def test_the_row_with_the_highest_detail_is_read(tmp_path, order):
    namespace = ReferenceStore.open(tmp_path, create=True).namespace(identity())
    for detail in order:
        writer = namespace.writer(detail=detail)
        for key, values in list(ROWS.items())[: 12 - 4 * detail]:
            writer.add(key, scores_of(values) - detail * 2**-10)
        writer.commit()
        namespace.refresh()
    rows = namespace.read(KEYS)
    assert rows.details.tolist() == [2] * 4 + [1] * 4 + [0] * 4
    logps, found = namespace.lookup(KEYS)
    assert found.all()
    for place, values in enumerate(ROWS.values()):
        expected = scores_of(values)[0] - rows.details[place] * 2**-10
        assert logps[place] == rows.logps[place] == expected.sum(dtype=np.float64)
    assert namespace.counts().of_detail == {0: 12, 1: 8, 2: 4}


def test_keys_are_taken_as_bytes_and_as_an_array(tmp_path):
    namespace = write(tmp_path)
    namespace.refresh()
    array = np.frombuffer(b"".join(ROWS), np.uint8).reshape(-1, 16)
    np.testing.assert_array_equal(namespace.lookup(list(ROWS))[0], namespace.lookup(array)[0])
    assert namespace.lookup([])[0].shape == (0,)


def test_a_row_moved_to_another_reference_is_refused(tmp_path):
    first = write(tmp_path)
    second = write(tmp_path, {b"x" * 16: np.float32([-1])}, identity(attention="eager"))
    path = next(first.folder.glob("*.arrow"))
    path.rename(second.folder / path.name)
    second.refresh()
    with pytest.raises(ReferenceStoreError, match=rf"{path.name}.*checksum of 12 rows"):
        second.lookup(list(ROWS))


def test_a_committed_row_is_seen_by_others_after_their_refresh(tmp_path):
    write(tmp_path, {bytes(16): np.float32([-1])})
    reader = ReferenceStore.open(tmp_path).namespace(identity())
    write(tmp_path)
    assert reader.contains(list(ROWS)).sum() == 1
    reader.refresh()
    assert reader.contains(list(ROWS)).all()
    assert (len(reader), reader.num_unique_rows()) == (13, 12)


def test_a_segment_that_cannot_be_opened_is_named(tmp_path):
    namespace = write(tmp_path)
    path = next(namespace.folder.glob("*.arrow"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ReferenceStoreError, match=rf"{path.name}.*dpofast ref verify.*delete"):
        ReferenceStore.open(tmp_path).namespace(identity())


def test_a_segment_that_vanishes_under_a_reader_is_missed_at_the_next_refresh(tmp_path):
    namespace = write(tmp_path)
    namespace.refresh()
    assert namespace.contains(KEYS).all()
    next(namespace.folder.glob("*.arrow")).unlink()
    assert np.isfinite(namespace.lookup(KEYS)[0]).all()  # a mapped file stays readable
    namespace.refresh()
    assert not namespace.contains(KEYS).any()


def test_temporaries_of_a_killed_writer_are_not_read(tmp_path):
    namespace = write(tmp_path)
    whole = next(namespace.folder.glob("*.arrow")).read_bytes()
    (namespace.folder / f"{files.TEMPORARY_PREFIX}torn").write_bytes(whole[: len(whole) // 2])
    (namespace.folder / f"{files.TEMPORARY_PREFIX}whole").write_bytes(whole)
    namespace = ReferenceStore.open(tmp_path).namespace(identity())
    assert len(namespace) == 12


def test_reading_keeps_no_file_open(tmp_path):
    write(tmp_path, commits=12)
    before = len(os.listdir("/proc/self/fd"))
    namespace = ReferenceStore.open(tmp_path).namespace(identity())
    assert namespace.lookup(list(ROWS))[1].all()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_segment_that_the_system_refuses_is_not_called_damaged(tmp_path, monkeypatch):
    def refuses(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    write(tmp_path)
    monkeypatch.setattr(pa, "memory_map", refuses)
    with pytest.raises(ReferenceStoreError, match=r"can't read .*Permission denied\): check its"):
        ReferenceStore.open(tmp_path).namespace(identity())


@pytest.mark.slow
def test_half_a_million_rows_open_as_fast_as_they_sort_and_are_found_in_a_part_of_that(tmp_path):
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 256, (500_000, 16), dtype=np.uint8)
    store = ReferenceStore.open(tmp_path, create=True)
    writer = store.namespace(identity()).writer()
    values = -rng.random(64, dtype=np.float32)
    for row, key in enumerate(keys):
        writer.add(key.tobytes(), values)
        if row % 4096 == 4095:
            writer.commit()
    writer.commit()
    rows = store.namespace(identity())
    wanted = keys[rng.choice(len(keys), 10_000, replace=False)]
    assert rows.lookup(wanted)[1].all()

    def seconds(work):
        times = []
        for _ in range(5):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        return min(times)

    sorting = seconds(lambda: np.unique(keys.view("S16").ravel()))
    assert seconds(lambda: store.namespace(identity())) < 2 * sorting  # 0.35
    assert seconds(lambda: rows.lookup(wanted)) < 0.2 * sorting  # 0.04
