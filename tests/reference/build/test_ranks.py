"""Ranks that run one model together: threads here, processes in tests/distributed."""

from __future__ import annotations

import errno
import os
import threading

import numpy as np
import pytest

from dpofast.errors import ReferenceStoreError
from dpofast.reference.build.answers import read_answers
from dpofast.reference.build.builder import BuildOptions, build_reference, reference_logps
from dpofast.reference.build.ranks import Ranks, on_all_ranks
from dpofast.reference.store import writer
from dpofast.reference.store.store import ReferenceStore
from tests.reference.stubs import StubScorer, batches_of, expected_logps, identity, pairs

WORLD = 3


class Meeting:
    """Lets threads wait for each other, until a timeout."""

    def __init__(self):
        self.barrier = threading.Barrier(WORLD, timeout=10)
        self.objects = [None] * WORLD

    def exchange_of(self, rank):
        def exchange(given):
            self.objects[rank] = given
            self.barrier.wait()
            objects = list(self.objects)
            self.barrier.wait()
            return objects

        return exchange


class LockstepScorer(StubScorer):
    """Acts like a model that is divided over the ranks: a call ends once all ranks have made it."""

    def __init__(self, meeting):
        super().__init__()
        self.meeting = meeting

    def __call__(self, sequences):
        self.meeting.barrier.wait()
        return super().__call__(sequences)


def on_ranks(work):
    """-> what `work(rank, meeting)` returns on each rank, or the exception that it raises."""
    meeting, results = Meeting(), [None] * WORLD

    def run(rank):
        try:
            results[rank] = work(rank, meeting)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(WORLD)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def nothing(*_):
    pass


def builder(folder, num_pairs, fail=nothing, commit_rows=4096, at_barrier=nothing):
    """Make a rank's build in batches of 4 answers; `fail` can change what its scorer returns."""

    def build(rank, meeting):
        scorer = LockstepScorer(meeting)

        def score(sequences):
            logps = scorer(sequences)
            fail(rank, logps)
            return logps

        def barrier():
            meeting.barrier.wait()
            at_barrier(rank)

        where = folder(rank) if callable(folder) else folder
        report = build_reference(
            ReferenceStore.open(where, create=True).namespace(identity()),
            read_answers(pairs(num_pairs)),
            score,
            batches=batches_of(4),
            ranks=Ranks(rank, WORLD, barrier),
            options=BuildOptions(commit_rows=commit_rows, progress=False),
            exchange=meeting.exchange_of(rank),
        )
        return report.forward_passes, report.rows_scored

    return build


def logps(folder, num_pairs):
    namespace = ReferenceStore.open(folder).namespace(identity())
    return reference_logps(namespace, read_answers(pairs(num_pairs)))


@pytest.mark.parametrize(
    ("num_pairs", "expected"),
    [
        (10, [(2, 8), (2, 8), (2, 4)]),  # 5 batches
        (1, [(1, 2), (1, 0), (1, 0)]),
        (6, [(1, 4), (1, 4), (1, 4)]),
    ],
)
def test_all_call_the_model_equally_often(tmp_path, num_pairs, expected):
    assert on_ranks(builder(tmp_path, num_pairs)) == expected
    np.testing.assert_array_equal(logps(tmp_path, num_pairs), expected_logps(pairs(num_pairs)))
    assert on_ranks(builder(tmp_path, num_pairs)) == [(0, 0)] * WORLD


def test_ranks_fill_folders_of_their_own_in_step(tmp_path):
    results = on_ranks(builder(lambda rank: tmp_path / str(rank), 10))
    assert results == [(2 + 4, 20)] * WORLD  # 2, 2 and 1 batches, then 3, 3 and 4
    for rank in range(WORLD):
        np.testing.assert_array_equal(logps(tmp_path / str(rank), 10), expected_logps(pairs(10)))


def test_a_log_prob_that_is_not_finite_on_one_rank_stops_all(tmp_path):
    def fail(rank, logps):
        if rank == 1:
            logps[0][0] = np.nan

    first, second, third = on_ranks(builder(tmp_path, 10, fail))
    assert isinstance(second, ReferenceStoreError)
    assert "is not stored" in str(second)
    assert str(first) == str(third) == f"Rank 1 stopped the build: {second}"
    assert len(ReferenceStore.open(tmp_path).namespace(identity())) == 4 + 3 + 4
    assert [rows for _, rows in on_ranks(builder(tmp_path, 10))] == [4, 4, 1]


@pytest.mark.parametrize("commit_rows", [1, 4096], ids=["between calls", "at the end"])
def test_a_disk_that_is_full_for_one_rank_stops_all(tmp_path, monkeypatch, commit_rows):
    write = writer.write_segment

    def write_segment(folder, digest, columns, rank):
        if rank == 2:
            raise ReferenceStoreError(os.strerror(errno.ENOSPC))
        write(folder, digest, columns, rank)

    monkeypatch.setattr(writer, "write_segment", write_segment)
    first, second, third = on_ranks(builder(tmp_path, 10, commit_rows=commit_rows))
    assert str(third) == "No space left on device"
    assert str(first) == str(second) == f"Rank 2 stopped the build: {third}"


def test_a_segment_that_one_rank_cannot_read_stops_all(tmp_path):
    def damage(rank):
        folder = tmp_path / str(rank) / identity().digest
        if rank == 0 and folder.is_dir():  # after the ranks' shares, before the rest
            (folder / f"{'ab' * 16}-0-{'cd' * 16}.arrow").write_bytes(b"damaged")

    build = builder(lambda rank: tmp_path / str(rank), 10, at_barrier=damage)
    first, second, third = on_ranks(build)
    assert "abab" in str(first)
    assert str(second) == str(third) == f"Rank 0 stopped the build: {first}"


def test_errors_of_any_kind_reach_all_ranks_and_without_exchange_the_action_is_just_called():
    def work(rank, meeting):
        return on_all_ranks(lambda: 12 // rank, meeting.exchange_of(rank))

    first, second, third = on_ranks(work)
    assert isinstance(first, ZeroDivisionError)
    assert str(second) == str(third) == f"Rank 0 stopped the build: {first}"
    assert on_all_ranks(lambda: 12, None) == 12
