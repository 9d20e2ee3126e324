from __future__ import annotations

import errno
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest

from dpofast.errors import ReferenceStoreError
from dpofast.reference.store import files
from dpofast.reference.store.row_detail import RowDetail
from dpofast.reference.store.store import ReferenceStore
from tests.reference.stubs import identity

ROWS = {
    bytes([i] * 16): -np.random.default_rng(i).random(i % 5 + 1, dtype=np.float32)
    for i in range(12)
}
KEYS = list(ROWS)


def write(folder, rows=ROWS, reference=None, commits=1):
    namespace = ReferenceStore.open(folder, create=True).namespace(reference or identity())
    writer = namespace.writer()
    items = list(rows.items())
    for part in range(commits):
        for key, values in items[part::commits]:
            writer.add(key, values)
        assert writer.commit() == len(items[part::commits])
    return namespace


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


def test_the_sum_is_of_what_was_given_not_of_what_is_kept_in_float32(tmp_path):
    values = np.array([-1 / 3, -1e-9, -2 / 7])
    namespace = write(tmp_path, {b"k" * 16: values})
    namespace.refresh()
    rows = namespace.read([b"k" * 16])
    assert rows.logps[0] == values.sum() != np.float32(values).sum(dtype=np.float64)
    np.testing.assert_array_equal(rows.per_token_logps[0], values.astype(np.float32))


def scores_of(values):
    """[2, num_tokens]: log-probs, and log-sum-exps that are none of the log-probs."""
    return np.stack([values, 3 - 2 * values])


@pytest.mark.parametrize("detail", RowDetail)
def test_a_row_holds_what_its_detail_says(tmp_path, detail):
    namespace = ReferenceStore.open(tmp_path, create=True).namespace(identity())
    writer = namespace.writer(detail=detail)
    for key, values in ROWS.items():
        writer.add(key, scores_of(values))
    writer.commit()
    namespace.refresh()
    rows = namespace.read(KEYS)
    for place, values in enumerate(ROWS.values()):
        logps, logsumexps = scores_of(values)
        assert rows.logps[place] == logps.sum(dtype=np.float64)
        assert rows.num_tokens[place] == len(logps)
        assert rows.details[place] == detail
        np.testing.assert_array_equal(
            rows.per_token_logps[place], logps if detail >= RowDetail.LOGPS else []
        )
        np.testing.assert_array_equal(
            rows.per_token_logsumexps[place], logsumexps if detail >= RowDetail.LOGSUMEXPS else []
        )
    for wanted in RowDetail:
        assert namespace.contains(KEYS, wanted).all() == (wanted <= detail)
        assert namespace.contains(KEYS, wanted).any() == (wanted <= detail)
    assert not namespace.contains([b"n" * 16]).any()
    counts = namespace.counts()
    assert (counts.rows, counts.tokens) == (12, sum(map(len, ROWS.values())))
    assert counts.of_detail == {wanted: 12 * (wanted <= detail) for wanted in RowDetail}


@pytest.mark.parametrize("order", list(itertools.permutations(RowDetail)))
def test_of_rows_that_stand_twice_the_fullest_is_read(tmp_path, order):
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


def test_a_row_without_the_log_sum_exps_that_were_asked_for_is_refused(tmp_path):
    namespace = ReferenceStore.open(tmp_path, create=True).namespace(identity())
    writer = namespace.writer(detail=RowDetail.LOGSUMEXPS)
    with pytest.raises(ReferenceStoreError, match=r"row 7 \(chosen\) have no log-sum-exps"):
        writer.add(bytes(16), np.float32([-1]), "row 7 (chosen)")
    assert writer.commit() == 0


def test_a_log_sum_exp_that_is_not_finite_is_refused_where_it_is_stored(tmp_path):
    namespace = ReferenceStore.open(tmp_path, create=True).namespace(identity())
    scores = np.array([[-1.0, -2.0], [3.0, np.inf]])
    with pytest.raises(ReferenceStoreError, match=r"log-sum-exp of row 7 is inf at .* token 1"):
        namespace.writer(detail=RowDetail.LOGSUMEXPS).add(bytes(16), scores, "row 7")
    namespace.writer(detail=RowDetail.LOGPS).add(bytes(16), scores, "row 7")


def test_keys_are_taken_as_bytes_and_as_an_array(tmp_path):
    namespace = write(tmp_path)
    namespace.refresh()
    array = np.frombuffer(b"".join(ROWS), np.uint8).reshape(-1, 16)
    np.testing.assert_array_equal(namespace.lookup(list(ROWS))[0], namespace.lookup(array)[0])
    assert namespace.lookup([])[0].shape == (0,)


def test_each_reference_has_rows_of_its_own(tmp_path):
    write(tmp_path)
    other = identity(attention="eager")
    namespace = write(tmp_path, {bytes(16): np.float32([-1])}, other)
    namespace.refresh()
    assert not namespace.lookup(list(ROWS)[1:])[1].any()
    store = ReferenceStore.open(tmp_path)
    assert store.digests() == sorted([identity().digest, other.digest])
    assert store.identity(other.digest) == other


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


def test_rows_that_are_not_committed_are_not_there(tmp_path):
    namespace = ReferenceStore.open(tmp_path, create=True).namespace(identity())
    writer = namespace.writer()
    writer.add(bytes(16), np.float32([-1]))
    assert writer.pending_rows == 1
    namespace.refresh()
    assert len(namespace) == 0
    assert writer.commit() == 1
    assert writer.commit() == writer.pending_rows == 0


@pytest.mark.parametrize("detail", [RowDetail.SUMS, RowDetail.LOGPS])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1e39])
def test_a_log_prob_that_is_not_finite_is_refused_with_its_row(tmp_path, value, detail):
    namespace = ReferenceStore.open(tmp_path, create=True).namespace(identity())
    writer = namespace.writer(detail=detail)
    with pytest.raises(ReferenceStoreError, match=r"row 7 \(chosen\).*token 1"):
        writer.add(bytes(16), np.array([-1.0, value]), "row 7 (chosen)")
    assert writer.commit() == 0


def test_opening_does_not_make_folders_for_references(tmp_path):
    store = ReferenceStore.open(tmp_path / "a" / "b", create=True)
    namespace = store.namespace(identity())
    assert not namespace.lookup([bytes(16)])[1].any()
    assert os.listdir(store.folder) == ["store.json"]


def test_a_folder_that_is_not_a_store_is_refused(tmp_path):
    with pytest.raises(ReferenceStoreError, match="no reference store in"):
        ReferenceStore.open(tmp_path / "nothing")
    with pytest.raises(ReferenceStoreError, match="no reference store in"):
        ReferenceStore.open(tmp_path)
    (tmp_path / "thesis.tex").write_text("x")
    for create in (False, True):
        with pytest.raises(ReferenceStoreError, match=r"thesis\.tex.*choose"):
            ReferenceStore.open(tmp_path, create=create)
    with pytest.raises(ReferenceStoreError, match="not a file"):
        ReferenceStore.open(tmp_path / "thesis.tex", create=True)


def test_a_folder_where_another_process_is_making_the_store_is_not_refused(tmp_path):
    (tmp_path / f"{files.TEMPORARY_PREFIX}1").write_text("{")
    assert ReferenceStore.open(tmp_path, create=True).digests() == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"format": "dpofast reference store", "version": 0}, "version 0.*reads version 1.*delete"),
        ({"format": "dpofast reference store", "version": 2}, "version 2.*use the dpofast that"),
        ({"format": "dpofast reference store", "version": "1"}, "version '1'"),
        ({"format": "another", "version": 1}, "another"),
        ({"version": 1}, "damaged"),
        ([], "damaged"),
    ],
)
def test_a_store_of_another_version_is_refused(tmp_path, content, message):
    write(tmp_path)
    (tmp_path / "store.json").write_text(json.dumps(content))
    with pytest.raises(ReferenceStoreError, match=message):
        ReferenceStore.open(tmp_path, create=True)


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
    assert np.isfinite(namespace.lookup(KEYS)[0]).all()  # what is mapped stays readable
    namespace.refresh()
    assert not namespace.contains(KEYS).any()


def test_a_damaged_identity_is_named(tmp_path):
    namespace = write(tmp_path)
    path = namespace.folder / "identity.json"
    path.write_text(path.read_text().replace("sdpa", "sdpb"))
    with pytest.raises(ReferenceStoreError, match=r"identity\.json can't be read"):
        ReferenceStore(namespace.store_folder).identity(identity().digest)


def test_temporaries_of_a_killed_writer_are_not_read(tmp_path):
    namespace = write(tmp_path)
    whole = next(namespace.folder.glob("*.arrow")).read_bytes()
    (namespace.folder / f"{files.TEMPORARY_PREFIX}torn").write_bytes(whole[: len(whole) // 2])
    (namespace.folder / f"{files.TEMPORARY_PREFIX}whole").write_bytes(whole)
    namespace = ReferenceStore.open(tmp_path).namespace(identity())
    assert len(namespace) == 12


class FailingFile:
    """Writes half of what it is given, then the disk is full."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, content):
        self.file.write(memoryview(content)[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("operation", ["open", "write", "fsync", "rename"])
def test_a_full_disk_is_named_and_the_writer_goes_on_once_there_is_room(
    tmp_path, monkeypatch, operation
):
    namespace = write(tmp_path, {bytes(16): np.float32([-1])})
    writer = namespace.writer()
    for key, values in ROWS.items():
        writer.add(key, values)
    with monkeypatch.context() as patch:
        if operation == "fsync":
            patch.setattr(files.os, "fsync", fail)
        elif operation == "write":
            original = Path.open
            patch.setattr(Path, "open", lambda *args: FailingFile(original(*args)))
        else:
            patch.setattr(Path, operation, fail)
        with pytest.raises(ReferenceStoreError, match=rf"{namespace.folder}.*make room"):
            writer.commit()
    reader = ReferenceStore.open(tmp_path).namespace(identity())
    assert len(reader) == 1
    assert not [n for n in os.listdir(namespace.folder) if n.startswith(files.TEMPORARY_PREFIX)]
    assert writer.commit() == 12
    reader.refresh()
    assert reader.lookup(list(ROWS))[1].all()


def test_reading_keeps_no_file_open(tmp_path):
    write(tmp_path, commits=12)
    before = len(os.listdir("/proc/self/fd"))
    namespace = ReferenceStore.open(tmp_path).namespace(identity())
    assert namespace.lookup(list(ROWS))[1].all()
    assert len(os.listdir("/proc/self/fd")) == before
