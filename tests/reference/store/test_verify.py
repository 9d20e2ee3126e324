from __future__ import annotations

import random

import numpy as np
import pytest

from dpofast.errors import ReferenceStoreError
from dpofast.reference.store import verify as verifying
from dpofast.reference.store.files import TEMPORARY_PREFIX
from dpofast.reference.store.row_detail import RowDetail
from dpofast.reference.store.store import ReferenceStore
from dpofast.reference.store.text import human_bytes
from dpofast.reference.store.verify import verify
from tests.reference.mixed_store import DETAILS, ROWS, mixed_store, segment_of
from tests.reference.stubs import identity


@pytest.fixture
def store(tmp_path):
    return mixed_store(tmp_path / "store")


def test_an_undamaged_store_verifies(store):
    report = verify(store.folder)
    assert report.ok
    assert (report.references, report.segments, report.rows) == (1, 1, 3)
    files = [path for path in store.folder.rglob("*") if path.is_file()]
    assert report.bytes == sum(path.stat().st_size for path in files)
    assert report.lines() == [
        f"{store.folder}: 3 rows of 1 reference in 1 segment, "
        f"{human_bytes(report.bytes)} read: all as it was written"
    ]


def refused_or_right(store):
    """Assert that a reader of a damaged store gets what was written, or an error."""
    try:
        namespace = ReferenceStore.open(store.folder).namespace(identity())
        rows = namespace.read(list(ROWS))
    except ReferenceStoreError:
        return
    for place, (key, values) in enumerate(ROWS.items()):
        if rows.found[place]:
            assert rows.logps[place] == values.sum(dtype=np.float64), key
            assert rows.num_tokens[place] == len(values)
            assert rows.details[place] == DETAILS[key]
            logps = values if DETAILS[key] >= RowDetail.LOGPS else []
            logsumexps = -7 * values if DETAILS[key] >= RowDetail.LOGSUMEXPS else []
            np.testing.assert_array_equal(rows.per_token_logps[place], logps)
            np.testing.assert_array_equal(rows.per_token_logsumexps[place], logsumexps)


def faults_of(store):
    try:
        return verify(store.folder).faults
    except ReferenceStoreError as error:  # store.json
        return [str(error)]


def flip_and_check(store, path, bits):
    whole = path.read_bytes()
    for bit in bits:
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert any(path.name in fault for fault in faults_of(store)), bit
        if path.suffix == ".arrow":
            refused_or_right(store)
    path.write_bytes(whole)
    assert verify(store.folder).ok


def test_flipped_bits_are_found_and_never_served(store):
    path = segment_of(store)
    num_bits = 8 * path.stat().st_size
    flip_and_check(store, path, random.Random(0).sample(range(num_bits), 500))


@pytest.mark.torture
@pytest.mark.slow
def test_every_flipped_bit_is_found_and_never_served(store):
    path = segment_of(store)
    flip_and_check(store, path, range(8 * path.stat().st_size))


def test_flipped_bits_of_the_json_files_are_found(store):
    for name in ("store.json", f"{identity().digest}/identity.json"):
        path = store.folder / name
        flip_and_check(store, path, range(0, 8 * path.stat().st_size, 3))


def test_a_cut_file_is_found(store):
    path = segment_of(store)
    path.write_bytes(path.read_bytes()[:-1])
    (fault,) = verify(store.folder).faults
    assert str(path) in fault
    assert "delete" in fault


def test_a_missing_identity_is_found_and_written_anew_by_the_next_build(store):
    path = segment_of(store).with_name("identity.json")
    path.unlink()
    (fault,) = verify(store.folder).faults
    assert "identity.json" in fault
    store.namespace(identity()).writer()
    assert verify(store.folder).ok


def test_files_that_do_not_belong_to_the_store_are_reported(store):
    (store.folder / "notes\x1b[2J.txt").write_text("x")
    segment = segment_of(store)
    (segment.parent / f"{TEMPORARY_PREFIX}1").write_bytes(b"x")
    report = verify(store.folder)
    assert report.ok
    assert len(report.notes) == 2
    assert all(map(str.isprintable, report.lines()))
    segment.rename(segment.with_name("copy.arrow"))
    (fault,) = verify(store.folder).faults
    assert "copy.arrow has a name" in fault


def test_a_segment_written_during_verify_is_no_stranger(store, monkeypatch):
    """A segment is committed between any two listings of a folder."""
    listed = verifying.list_names

    def commits_afterwards(folder):
        names = listed(folder)
        writer = store.namespace(identity()).writer()
        writer.add(b"n" * 16, np.float32([-1.0]))
        writer.commit()
        return names

    monkeypatch.setattr(verifying, "list_names", commits_afterwards)
    found = verify(store.folder)
    assert found.ok
    assert not found.notes


def test_a_segment_that_a_prune_merges_meanwhile_is_no_damage(store, monkeypatch):
    """A segment is in the listing, and gone when it is read."""
    name = segment_of(store).name.replace("-", "0-", 1)[1:]  # another segment's name
    listed = verifying.list_names
    monkeypatch.setattr(
        verifying,
        "list_names",
        lambda folder: [*listed(folder), *([name] if folder != store.folder else [])],
    )
    assert verify(store.folder).ok


def test_the_same_row_twice_is_fine_and_another_value_is_not(store):
    writer = store.namespace(identity()).writer()
    key, values = next(iter(ROWS.items()))
    writer.add(key, values + np.float32(1e-3))
    writer.commit()
    assert verify(store.folder).ok
    writer.add(key, values + 1)
    writer.commit()
    (fault,) = verify(store.folder).faults
    assert key.hex() in fault
    assert "1 rows twice" in fault


def test_an_empty_store_is_undamaged(tmp_path):
    ReferenceStore.open(tmp_path, create=True)
    assert verify(tmp_path).ok
