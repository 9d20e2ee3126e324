"""A pruned store has the same rows without duplicates; a prune that is killed loses none."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest

from dpofast.errors import ReferenceStoreError
from dpofast.reference.store import files
from dpofast.reference.store import prune as pruning
from dpofast.reference.store.info import info
from dpofast.reference.store.prune import prune
from dpofast.reference.store.row_detail import RowDetail
from dpofast.reference.store.segments import Segment
from dpofast.reference.store.store import ReferenceStore
from dpofast.reference.store.verify import verify
from tests.reference.stubs import KEYS, ROWS, identity, write


def assert_rows(folder, rows=ROWS, reference=None):
    """Assert that a reference has exactly these rows, each once, and that no file is damaged."""
    namespace = ReferenceStore.open(folder).namespace(reference or identity())
    stored = namespace.read(list(rows))
    assert stored.found.all()
    for got, wanted in zip(stored.per_token_logps, rows.values(), strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert len(namespace) == namespace.num_unique_rows() == len(rows)
    assert verify(folder).ok


def segments(folder):
    return sorted(path.name for path in folder.glob("*/*.arrow"))


def columns_of(path):
    return Segment(path, bytes.fromhex(identity().digest)).columns


def test_segments_are_merged_and_duplicate_rows_dropped(tmp_path):
    write(tmp_path, commits=5)
    write(tmp_path, commits=2)
    report = prune(tmp_path)
    assert (report.references, report.duplicates) == (1, 12)
    assert (report.segments_before, report.segments_after) == (7, 1)
    assert report.bytes_freed > 0
    assert_rows(tmp_path)


@pytest.mark.parametrize("most", [60, 100_000])
def test_a_prune_keeps_the_row_with_the_highest_detail(tmp_path, monkeypatch, most):
    monkeypatch.setattr(pruning, "MERGED_BYTES", most)
    scores = {key: np.stack([values, 3 - values]) for key, values in ROWS.items()}
    namespace = write(tmp_path)
    for detail, keys in ((RowDetail.SUMS, KEYS), (RowDetail.LOGSUMEXPS, KEYS[:5])):
        writer = namespace.writer(detail=detail)
        for key in keys:
            writer.add(key, scores[key])
        writer.commit()
    assert prune(tmp_path).duplicates == 17
    namespace.refresh()
    stored = namespace.read(KEYS)
    assert stored.details.tolist() == [2] * 5 + [1] * 7
    for place, key in enumerate(KEYS[:5]):
        np.testing.assert_array_equal(stored.per_token_logsumexps[place], scores[key][1])
    assert_rows(tmp_path)


def test_a_second_prune_finds_nothing_to_do(tmp_path):
    write(tmp_path, commits=5)
    prune(tmp_path)
    before = segments(tmp_path)
    report = prune(tmp_path)
    assert segments(tmp_path) == before
    assert (report.duplicates, report.bytes_freed, report.segments_after) == (0, 0, 1)


@pytest.mark.parametrize("most", [1, 60, 110, 200, 5_000])
def test_large_segments_stay_and_merged_ones_keep_to_the_size(tmp_path, monkeypatch, most):
    write(tmp_path, commits=3)
    more = {bytes([i] * 16): np.full(3, -float(i), np.float32) for i in range(100, 130)}
    largest = {key: ROWS[key] for key in KEYS[::2]} | more
    write(tmp_path, rows=largest)
    before = segments(tmp_path)
    monkeypatch.setattr(pruning, "MERGED_BYTES", most)
    assert prune(tmp_path).duplicates == 6
    assert_rows(tmp_path, ROWS | more)
    sizes = {path.name: columns_of(path).row_bytes.sum() for path in tmp_path.glob("*/*.arrow")}
    kept = set(before) & set(sizes)
    # the largest has 36 rows of 44 bytes and 108 log-probs: less than half of 5,000 bytes
    assert len(kept) == (0 if most == 5_000 else 1)
    longest = 44 + 4 * max(len(values) for values in ROWS.values())
    assert max((sizes[name] for name in sizes if name not in kept), default=0) < most + longest


def test_the_beginning_of_a_digest_names_a_reference_to_forget(tmp_path):
    other = identity(attention="eager")
    write(tmp_path)
    write(tmp_path, reference=other)
    report = prune(tmp_path, [other.digest[:6]])
    assert (report.references, report.forgotten) == (1, [other.digest])
    assert ReferenceStore.open(tmp_path).digests() == [identity().digest]
    assert_rows(tmp_path)


def test_a_half_forgotten_reference_is_hidden(tmp_path, monkeypatch):
    other = identity(attention="eager")
    write(tmp_path)
    write(tmp_path, reference=other)

    def ends(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(pruning.shutil, "rmtree", ends)
        with pytest.raises(KeyboardInterrupt):
            prune(tmp_path, [other.digest])
    assert len(info(tmp_path)["references"]) == 1
    assert prune(tmp_path).temporaries == 1
    assert not list(tmp_path.rglob(f"{files.TEMPORARY_PREFIX}*"))
    assert_rows(tmp_path)


@pytest.mark.parametrize("name", ["", "12345", "no-digest"])
def test_a_name_that_fits_no_reference_deletes_nothing(tmp_path, name):
    write(tmp_path, commits=2)
    before = segments(tmp_path)
    with pytest.raises(ReferenceStoreError, match=rf"^'{name}' names \d references .*ref info"):
        prune(tmp_path, [identity().digest, name])
    assert segments(tmp_path) == before


def test_files_of_killed_writers_are_deleted_after_a_day(tmp_path):
    namespace = write(tmp_path)
    for folder in (tmp_path, namespace.folder):
        for name, age in (("old", 2 * 86_400), ("new", 60)):
            path = folder / f"{files.TEMPORARY_PREFIX}{name}"
            path.write_bytes(b"torn")
            os.utime(path, (time.time() - age,) * 2)
    assert prune(tmp_path).temporaries == 2
    left = [path.name for path in tmp_path.rglob(f"{files.TEMPORARY_PREFIX}*")]
    assert left == [f"{files.TEMPORARY_PREFIX}new"] * 2


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_a_damaged_row_stops_it_before_anything_changes(tmp_path, monkeypatch, place):
    # All segments are small, and two would be written.
    monkeypatch.setattr(pruning, "MERGED_BYTES", 400)
    namespace = write(tmp_path, commits=4)
    before = segments(tmp_path)
    path = namespace.folder / before[place]
    content = bytearray(path.read_bytes())
    content[content.find(columns_of(path).per_token_logps[0].tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(ReferenceStoreError, match=rf"{path.name} is damaged"):
        prune(tmp_path)
    assert segments(tmp_path) == before


@pytest.mark.parametrize(
    ("function", "calls"), [("write_segment", 0), ("write_segment", 1), ("sync", 0)]
)
def test_an_end_at_any_moment_loses_no_row(tmp_path, monkeypatch, function, calls):
    write(tmp_path, commits=4)
    monkeypatch.setattr(pruning, "MERGED_BYTES", 400)  # all segments are small; two are written
    original, count = getattr(pruning, function), iter(range(100))

    def ends(*arguments, **options):
        if next(count) == calls:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(pruning, function, ends)
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path)
    monkeypatch.setattr(pruning, function, original)
    namespace = ReferenceStore.open(tmp_path).namespace(identity())
    assert namespace.contains(KEYS).all()
    prune(tmp_path)
    assert_rows(tmp_path)


def test_readers_and_writers_go_on_during_a_prune(tmp_path):
    reader = write(tmp_path, commits=4)
    reader.refresh()
    before = reader.lookup(KEYS)[0]
    writer = reader.writer()
    writer.add(b"n" * 16, np.array([-1.0], np.float32))
    prune(tmp_path)
    np.testing.assert_array_equal(reader.lookup(KEYS)[0], before)
    writer.commit()
    reader.refresh()
    np.testing.assert_array_equal(reader.lookup(KEYS)[0], before)
    assert reader.contains([b"n" * 16]).all()
    assert len(reader) == len(ROWS) + 1
