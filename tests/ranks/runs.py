"""The watchers of a small run, as threads of one process."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

from dpofast.ranks.hub import Hub
from dpofast.ranks.member import Member
from dpofast.ranks.spoke import Spoke
from dpofast.ranks.verdict import Event, Kind, Verdict
from dpofast.ranks.watcher import Watcher
from dpofast.ranks.wire import Wire

SOON = 5.0


class Run:
    """The watchers of all ranks.

    Args:
        hosts: the host of each rank.

    Attributes:
        said: what each rank has printed.
        ended: the exit codes with which each rank has been ended.
    """

    def __init__(self, *hosts: str) -> None:
        self.said: dict[int, list[str]] = {rank: [] for rank in range(len(hosts))}
        self.ended: dict[int, list[int]] = {rank: [] for rank in range(len(hosts))}
        self.members = [Member(rank, host, host) for rank, host in enumerate(hosts)]
        self.hub = Hub(*self._arguments(0))
        self.watchers: list[Watcher] = [self.hub]
        self.sockets: dict[int, socket.socket] = {}
        self.hub.start()
        # In any order: who prints on a node must not depend on who comes first.
        for rank in reversed(range(1, len(hosts))):
            spoke = Spoke(self._meeting(rank), *self._arguments(rank))
            self.watchers.insert(1, spoke)
            spoke.start()
            assert spoke.connected.wait(SOON)
        # The hub counts a rank before it has told all who prints, so wait for the latter.
        lowest = {host: hosts.index(host, 1) for host in hosts[1:]}
        wait_until(lambda: self.hub.speakers == lowest)

    def _arguments(self, rank: int) -> tuple:
        said, ended = self.said[rank], self.ended[rank]
        return self.members[rank], len(self.members), 20.0, said.append, ended.append

    def _meeting(self, rank: int) -> Callable[[float], tuple[Wire, str]]:
        def meet(timeout: float) -> tuple[Wire, str]:
            where = ("127.0.0.1", self.hub.port)
            self.sockets[rank] = socket.create_connection(where, SOON)
            return Wire(self.sockets[rank], timeout), self.hub.token

        return meet

    def fail(self, rank: int, kind: Kind, text: str = "", detail: str = "") -> Verdict | None:
        return self.watchers[rank].fail(Event(self.members[rank], kind, text, detail), SOON)

    def lose(self, rank: int) -> None:
        """End the connections of a rank, as the end of its process does."""
        for each, connection in self.sockets.items():
            if rank in (0, each):
                connection.shutdown(socket.SHUT_RDWR)

    def join(self, without: int | None = None) -> None:
        for rank, watcher in enumerate(self.watchers):
            if rank != without:
                watcher.join(SOON)
                assert not watcher.is_alive()


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
