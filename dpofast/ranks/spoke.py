"""The part of every rank but 0: tells rank 0 what happens here, and hears why the run ends."""

from __future__ import annotations

import logging
import selectors
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from dpofast.ranks.member import Member
from dpofast.ranks.verdict import Event, Kind, Verdict, judge
from dpofast.ranks.watcher import Watcher
from dpofast.ranks.wire import Wire

logger = logging.getLogger(__name__)


class Spoke(Watcher):
    """Connects to rank 0 and listens to it.

    Args:
        meet: finds rank 0 and returns a wire to it and the token that it wants to hear. It can take
            as long as rank 0 needs to start.
        arguments: as in Watcher.
    """

    def __init__(self, meet: Callable[[float], tuple[Wire, str]], *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._meet = meet
        self._wire: Wire | None = None
        self._hub: Member | None = None
        self._is_speaker = False

    def run(self) -> None:
        """Connect, and listen until the run ends."""
        try:
            wire, token = self._meet(self.timeout)
        except (OSError, RuntimeError, ValueError) as error:
            logger.error(
                "rank_timeout: %s can't connect to rank 0, so nobody will notice if one of them is "
                "lost: %s",
                self.member,
                error,
            )
            self.connected.set()  # nobody should wait for that any more
            self._settled.set()
            return
        self._wire = wire
        wire.send(kind="hello", token=token, member=asdict(self.member))
        self._selector.register(wire, selectors.EVENT_READ, self._listen)
        self.connected.set()
        while self._wire is not None:
            self._handle_some()
            if self._is_due():
                self._decide()

    def close(self) -> None:
        """Close this process's ends of all connections, without a word; for forked children."""
        super().close()
        if self._wire is not None:
            self._wire.close()

    def _listen(self) -> None:
        if self._wire is None:
            return  # what happened at the same moment has closed it
        try:
            for message in self._wire.read():
                self._take(message)
        except (EOFError, ValueError):
            self._lose(Kind.GONE)
        except OSError:
            self._lose(Kind.SILENT, f"{self.timeout:g} s")

    def _take(self, message: dict[str, Any]) -> None:
        match message.get("kind"):
            case "welcome":
                self._hub = Member(**message["member"])
            case "speaker":
                self._is_speaker = bool(message["speaks"])
            case "finished":
                self._hang_up()
            case "verdict":
                self._hang_up()
                if message["text"]:
                    self._say(message["text"])
                causes = self._events if message["is_cause"] else ()
                self._conclude(Verdict(tuple(causes), tuple(message["lines"]), {}))

    def _lose(self, kind: Kind, text: str = "") -> None:
        assert self._wire is not None
        self._selector.unregister(self._wire)
        self._add(Event(self._hub or Member(0, "unknown", ""), kind, text))

    def _decide(self) -> None:
        """Rank 0 is lost, so this rank decides for itself."""
        verdict = judge(self._events, self.num_ranks)
        if self._is_speaker or (self._failed and verdict.blames(self.member.rank)):
            self._say(verdict.text(self.member.node))
        self._hang_up()
        self._conclude(verdict)

    def _own_event(self, event: Event) -> None:
        self._events.append(event)  # rank 0 decides when it is time
        if self._wire is not None:
            self._wire.send(kind="failed", what=event.kind, text=event.text, detail=event.detail)

    def _keep_alive(self, timeout: float) -> None:
        super()._keep_alive(timeout)
        if self._wire is not None:
            self._wire.keep_alive(timeout)

    def _say_goodbye(self) -> None:
        if self._wire is not None:
            self._wire.send(kind="finished")
            self._hang_up()

    def _hang_up(self) -> None:
        if self._wire is not None:
            if self._wire in {key.fileobj for key in self._selector.get_map().values()}:
                self._selector.unregister(self._wire)
            self._wire.close()
            self._wire = None
