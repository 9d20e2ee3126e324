"""Rank 0's watcher and those of other ranks, as threads of one process."""

from __future__ import annotations

import socket
import time

import pytest

from dpofast.errors import RankError
from dpofast.ranks import watcher as watcher_module
from dpofast.ranks.hub import Hub
from dpofast.ranks.member import Member
from dpofast.ranks.spoke import Spoke
from dpofast.ranks.verdict import Event, Kind
from dpofast.ranks.wire import Wire

SOON = 5.0


class Run:
    """The watchers of a run; ranks are given as the names of their hosts."""

    def __init__(self, *hosts: str) -> None:
        self.said: dict[int, list[str]] = {rank: [] for rank in range(len(hosts))}
        self.ended: dict[int, list[int]] = {rank: [] for rank in range(len(hosts))}
        self.members = [Member(rank, host, host) for rank, host in enumerate(hosts)]
        self.hub = Hub(*self._arguments(0))
        self.hub.start()
        self.spokes = [Spoke(self._meet, *self._arguments(rank)) for rank in range(1, len(hosts))]
        self.wires: list[Wire] = []
        for spoke in self.spokes:
            spoke.start()
            assert spoke.connected.wait(SOON)
        self.watchers = [self.hub, *self.spokes]
        wait_until(lambda: self.hub.num_connected == len(self.spokes))

    def _arguments(self, rank):
        return (
            self.members[rank],
            len(self.members),
            20.0,
            self.said[rank].append,
            self.ended[rank].append,
        )

    def _meet(self, timeout):
        connection = socket.create_connection(("127.0.0.1", self.hub.port), SOON)
        self.wires.append(Wire(connection, timeout))
        return self.wires[-1], self.hub.token

    def fail(self, rank, kind, text="", detail=""):
        return self.watchers[rank].fail(Event(self.members[rank], kind, text, detail), SOON)

    def join(self):
        for watcher in self.watchers:
            watcher.join(SOON)
            assert not watcher.is_alive()


def wait_until(condition):
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def short_grace(monkeypatch):
    monkeypatch.setattr(watcher_module, "GRACE_SECONDS", 0.2)


def test_an_error_of_a_rank_is_said_once_on_each_node_and_ends_the_others():
    run = Run("a", "a", "b", "b")
    verdict = run.fail(3, Kind.ERROR, "the disk is full.")
    run.join()
    line = "dpofast: error: rank 3 on host b: the disk is full."
    assert run.said == {0: [line], 1: [], 2: [line], 3: []}
    assert run.ended == {0: [RankError.exit_code], 1: [4], 2: [4], 3: []}
    assert verdict.blames(3)
    assert verdict.lines == (line,)
