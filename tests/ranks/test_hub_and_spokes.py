from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dpofast.errors import RankError
from dpofast.ranks import watcher as watcher_module
from dpofast.ranks.member import Member
from dpofast.ranks.spoke import Spoke
from dpofast.ranks.verdict import Event, Kind
from tests.ranks.runs import SOON, Run, wait_until

CODE = RankError.exit_code


@pytest.fixture(autouse=True)
def short_grace(monkeypatch):
    monkeypatch.setattr(watcher_module, "GRACE_SECONDS", 0.1)


@pytest.mark.parametrize("failing", [0, 1, 3])
def test_an_error_is_said_once_on_each_node_and_ends_the_others(failing):
    run = Run("a", "a", "b", "b")
    verdict = run.fail(failing, Kind.ERROR, "the disk is full.")
    run.join()
    host = run.members[failing].host
    line = f"dpofast: error: rank {failing} on host {host}: the disk is full."
    assert run.said == {0: [line], 1: [], 2: [line], 3: []}
    assert run.ended == {rank: [CODE] * (rank != failing) for rank in range(4)}
    assert verdict.blames(failing)
    assert verdict.lines == (line,)


@pytest.mark.parametrize("lost", [1, 3])
def test_a_lost_rank_ends_the_others(lost):
    run = Run("a", "a", "b", "b")
    run.lose(lost)
    run.join()
    assert [len(run.said[rank]) for rank in (0, 2)] == [1, 1]
    assert f"rank {lost} on host {run.members[lost].host} was lost" in run.said[0][0]
    assert [run.ended[rank] for rank in range(4) if rank != lost] == [[CODE]] * 3


def test_when_rank_0_is_lost_one_rank_of_each_node_says_so():
    run = Run("a", "a", "a", "b", "b")
    run.lose(0)
    for watcher in run.watchers[1:]:
        watcher.join(SOON)
    assert [len(run.said[rank]) for rank in range(1, 5)] == [1, 0, 1, 0]
    assert "rank 0 on host a was lost" in run.said[3][0]
    assert [run.ended[rank] for rank in range(1, 5)] == [[CODE]] * 4


def test_an_error_on_all_ranks_is_decided_at_once_and_ends_nobody(monkeypatch):
    monkeypatch.setattr(watcher_module, "GRACE_SECONDS", 60.0)
    run = Run("a", "a", "b")
    failing = [
        threading.Thread(target=run.fail, args=(rank, Kind.ERROR, "beta: no.")) for rank in range(3)
    ]
    for thread in failing:
        thread.start()
    for thread in failing:
        thread.join(SOON)
        assert not thread.is_alive()
    run.join()
    line = "dpofast: error: beta: no."
    assert run.said == {0: [line], 1: [], 2: [line]}
    assert run.ended == {0: [], 1: [], 2: []}


def test_an_exception_that_follows_from_a_lost_rank_is_not_reported(monkeypatch):
    monkeypatch.setattr(watcher_module, "GRACE_SECONDS", 60.0)
    run = Run("a", "b", "c")
    with ThreadPoolExecutor() as pool:
        failing = pool.submit(
            run.fail, 1, Kind.BUG, "RuntimeError: Connection closed by peer", "Traceback"
        )
        time.sleep(0.1)
        run.lose(2)
        verdict = failing.result(SOON)
    run.join()
    assert not verdict.blames(1)
    assert "rank 2 on host c was lost" in verdict.lines[0]
    assert len(run.said[0]) == len(run.said[1]) == 1
    assert run.ended[1] == []  # its main thread ends it


def test_a_death_is_reported_before_the_launcher_kills_the_other_ranks(monkeypatch):
    monkeypatch.setattr(watcher_module, "GRACE_SECONDS", 60.0)
    run = Run("a", "a", "a")
    run.lose(1)
    run.join()
    assert len(run.said[0]) == 1
    assert "rank 1 on host a was lost" in run.said[0][0]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
@pytest.mark.slow
def test_ranks_may_finish_in_any_order(order):
    run = Run("a", "a", "b")
    for rank in order:
        run.watchers[rank].finish(SOON)
        time.sleep(2 * watcher_module.GRACE_SECONDS)
    run.join()
    assert run.said == {0: [], 1: [], 2: []}
    assert run.ended == {0: [], 1: [], 2: []}


def test_all_ranks_may_finish_at_the_same_moment():
    for _ in range(10):
        run = Run(*["a"] * 6)
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda watcher: watcher.finish(SOON), run.watchers))
        run.join()
        assert not any(run.said.values())
        assert not any(run.ended.values())


def test_rank_0_finishing_tells_why_the_run_ends_if_it_knows(monkeypatch):
    run = Run("a", "a", "b")
    monkeypatch.setattr(watcher_module, "GRACE_SECONDS_AFTER_DEATH", 60.0)
    run.lose(2)
    wait_until(lambda: run.hub.num_connected == 1)
    run.hub.finish(SOON)
    run.join(without=2)
    assert run.ended[0] == []  # its work is done
    assert run.ended[1] == [CODE]
    assert "rank 2 on host b was lost" in run.said[0][0]


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b'{"kind": "hello", "token": "guessed", "member": {"rank": 1, "host": "x", "node": "x"}}\n',
        b'{"kind": "failed", "what": "error", "text": "x", "detail": ""}\n',
        b"[1]\n",
        b"\xff\xfe\n",
        b"x" * (2 << 20),
        b"",
    ],
    ids=["http", "wrong token", "no token", "list", "no text", "endless", "nothing"],
)
def test_strangers_are_hung_up_on(sent):
    run = Run("a", "a")
    with socket.create_connection(("127.0.0.1", run.hub.port), SOON) as stranger:
        try:
            stranger.sendall(sent)
            stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(1) == b""
        except ConnectionError:
            pass
    time.sleep(2 * watcher_module.GRACE_SECONDS)
    assert (run.said, run.ended) == ({0: [], 1: []}, {0: [], 1: []})
    run.watchers[1].finish(SOON)
    run.hub.finish(SOON)
    run.join()


def test_a_rank_that_cannot_reach_rank_0_does_not_wait_for_it():
    def meet(timeout):
        raise OSError("a firewall")

    said, ended = [], []
    spoke = Spoke(meet, Member(1, "b", "b"), 2, 20.0, said.append, ended.append)
    spoke.start()
    started = time.monotonic()
    assert spoke.connected.wait(SOON)
    assert spoke.fail(Event(spoke.member, Kind.ERROR, "no."), SOON) is None  # so nobody has said it
    assert time.monotonic() - started < SOON
    assert said == ended == []
