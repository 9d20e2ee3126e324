"""Rank 0's part: hears of all ranks, decides why the run ends, and tells all of them."""

from __future__ import annotations

import contextlib
import hmac
import secrets
import selectors
import socket
import time
from dataclasses import asdict
from functools import partial
from typing import Any

from dpofast.ranks.member import Member
from dpofast.ranks.verdict import Event, Kind, judge
from dpofast.ranks.watcher import Watcher
from dpofast.ranks.wire import Wire

GOODBYE_SECONDS = 3.0


class Hub(Watcher):
    """Listens on a free port of all interfaces; arguments as in Watcher.

    Attributes:
        port: the port.
        token: what a rank must know to be listened to.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._listener = _listen(max(128, self.num_ranks))
        self.port: int = self._listener.getsockname()[1]
        self.token = secrets.token_hex(16)
        self._strangers: set[Wire] = set()
        self._wires: dict[int, Wire] = {}  # by rank, without those that have finished
        self._members = {self.member.rank: self.member}
        self._speakers: dict[str, int] = {}
        self._is_over = False
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self.connected.set()

    def run(self) -> None:
        """Serve until the run ends."""
        while not self._is_over:
            self._handle_some()
            if self._is_due():
                self._pronounce()
                return
        if self._events:
            self._pronounce()

    @property
    def num_connected(self) -> int:
        """Ranks that have come and not left yet, without rank 0."""
        return len(self._wires)

    @property
    def speakers(self) -> dict[str, int]:
        """By node: the rank that prints if rank 0 is lost; each of them has been told."""
        return dict(self._speakers)

    def close(self) -> None:
        """Close this process's ends of all connections, without a word; for forked children."""
        super().close()
        self._listener.close()
        for wire in [*self._strangers, *self._wires.values()]:
            wire.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
            wire = Wire(connection, self.timeout)
        except OSError:
            return  # whoever called has hung up already
        self._strangers.add(wire)
        self._selector.register(wire, selectors.EVENT_READ, partial(self._greet, wire))

    def _greet(self, wire: Wire) -> None:
        """Read a stranger's first message; whoever doesn't know the token is hung up on."""
        try:
            messages = wire.read()
            if not messages:
                return
            hello = messages[0]
            if not hmac.compare_digest(str(hello["token"]), self.token):
                raise ValueError("wrong token")
            member = Member(**hello["member"])
        except (OSError, EOFError, ValueError, KeyError, TypeError):
            self._drop(wire)
            return
        self._strangers.discard(wire)
        self._wires[member.rank], self._members[member.rank] = wire, member
        self._selector.modify(wire, selectors.EVENT_READ, partial(self._listen, member, wire))
        wire.send(kind="welcome", member=asdict(self.member))
        self._choose_speakers()
        for message in messages[1:]:
            self._take(member, message)

    def _drop(self, wire: Wire) -> None:
        self._strangers.discard(wire)
        self._selector.unregister(wire)
        wire.close()

    def _listen(self, member: Member, wire: Wire) -> None:
        if self._wires.get(member.rank) is not wire:
            return  # what happened at the same moment has closed it
        try:
            for message in wire.read():
                self._take(member, message)
        except (EOFError, ValueError):
            self._lose(member, Kind.GONE)
        except OSError:
            self._lose(member, Kind.SILENT, f"{self.timeout:g} s")

    def _take(self, member: Member, message: dict[str, Any]) -> None:
        match message.get("kind"):
            case "failed":
                kind, text, detail = (str(message[name]) for name in ("what", "text", "detail"))
                self._add(Event(member, Kind(kind), text, detail))
            case "finished":
                self._forget(member)

    def _lose(self, member: Member, kind: Kind, text: str = "") -> None:
        self._forget(member)
        if all(event.member != member for event in self._events):
            self._add(Event(member, kind, text))

    def _forget(self, member: Member) -> None:
        wire = self._wires.pop(member.rank, None)
        if wire is not None:
            self._drop(wire)
            self._choose_speakers()

    def _choose_speakers(self) -> None:
        """On each node, the lowest rank that is left prints if rank 0 itself is lost."""
        speakers: dict[str, int] = {}
        for rank in sorted(self._wires):
            speakers.setdefault(self._members[rank].node, rank)
        before, now = set(self._speakers.values()), set(speakers.values())
        for rank in self._wires.keys() & (before ^ now):
            self._wires[rank].send(kind="speaker", speaks=rank in now)
        self._speakers = speakers

    def _keep_alive(self, timeout: float) -> None:
        super()._keep_alive(timeout)
        for wire in [*self._strangers, *self._wires.values()]:
            wire.keep_alive(timeout)

    def _own_event(self, event: Event) -> None:
        self._add(event)

    def _add(self, event: Event) -> None:
        super()._add(event)
        failed = {each.member.rank for each in self._events}
        if len(failed) == self.num_ranks:
            self._deadline = time.monotonic()  # nobody is left to wait for

    def _pronounce(self) -> None:
        """Tell all ranks why the run ends; on each node, one of them prints it."""
        verdict = judge(self._events, self.num_ranks)
        spoken = {self.member.node}
        for rank in sorted(self._wires):
            node = self._members[rank].node
            text = "" if node in spoken else verdict.text(node)
            spoken.add(node)
            self._wires[rank].send(
                kind="verdict", text=text, is_cause=verdict.blames(rank), lines=verdict.lines
            )
        self._say(verdict.text(self.member.node))
        self._hang_up()
        self._conclude(verdict)

    def _say_goodbye(self) -> None:
        self._is_over = True
        if not self._events:
            for wire in self._wires.values():
                wire.send(kind="finished")
            self._hang_up()

    def _hang_up(self) -> None:
        """Wait until the others have read the last message; ending at once could destroy it."""
        self._listener.close()
        end = time.monotonic() + GOODBYE_SECONDS
        for wire in self._wires.values():
            while (left := end - time.monotonic()) > 0 and self._is_open(wire, left):
                pass
            self._drop(wire)
        self._wires.clear()

    def _is_open(self, wire: Wire, wait: float) -> bool:
        with selectors.DefaultSelector() as selector:
            selector.register(wire, selectors.EVENT_READ)
            if not selector.select(wait):
                return False
        try:
            wire.read()
        except (OSError, EOFError, ValueError):
            return False
        return True


def _listen(backlog: int) -> socket.socket:
    """A socket that listens on a free port, to IPv6 as well if the machine has it."""
    where = ("", 0)
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # IPv6 can be switched off
            return socket.create_server(
                where, family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog
            )
    return socket.create_server(where, backlog=backlog)
