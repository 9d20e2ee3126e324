"""Rows are stored in the detail asked for, or refused; a full disk loses none."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from dpofast.errors import ReferenceStoreError
from dpofast.reference.store import files
from dpofast.reference.store.row_detail import RowDetail
from dpofast.reference.store.store import ReferenceStore
from tests.reference.stubs import KEYS, ROWS, identity, scores_of, write


def test_log_probs_are_summed_before_they_are_rounded_to_float32(tmp_path):
    values = np.array([-1 / 3, -1e-9, -2 / 7])
    namespace = write(tmp_path, {b"k" * 16: values})
    namespace.refresh()
    rows = namespace.read([b"k" * 16])
    assert rows.logps[0] == values.sum() != np.float32(values).sum(dtype=np.float64)
    np.testing.assert_array_equal(rows.per_token_logps[0], values.astype(np.float32))


@pytest.mark.parametrize("detail", RowDetail)
def test_a_row_has_the_values_of_its_detail(tmp_path, detail):
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


def test_a_row_without_the_log_sum_exps_that_were_asked_for_is_refused(tmp_path):
    namespace = ReferenceStore.open(tmp_path, create=True).namespace(identity())
    writer = namespace.writer(detail=RowDetail.LOGSUMEXPS)
    with pytest.raises(ReferenceStoreError, match=r"row 7 \(chosen\) have no log-sum-exps"):
        writer.add(bytes(16), np.float32([-1]), "row 7 (chosen)")
    assert writer.commit() == 0


def test_a_log_sum_exp_that_is_not_finite_is_refused_if_it_would_be_stored(tmp_path):
    namespace = ReferenceStore.open(tmp_path, create=True).namespace(identity())
    scores = np.array([[-1.0, -2.0], [3.0, np.inf]])
    with pytest.raises(ReferenceStoreError, match=r"log-sum-exp of row 7 is inf at .* token 1"):
        namespace.writer(detail=RowDetail.LOGSUMEXPS).add(bytes(16), scores, "row 7")
    namespace.writer(detail=RowDetail.LOGPS).add(bytes(16), scores, "row 7")


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


class FailingFile:
    """Writes half of its content, and then the disk is full."""

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
def test_a_full_disk_is_named_and_the_writer_can_commit_once_there_is_room(
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
