"""What the threads that watch the ranks share: commands from the main thread, and the end."""

from __future__ import annotations

import os
import queue
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from dpofast.errors import RankError
from dpofast.ranks.member import Member
from dpofast.ranks.verdict import Event, Kind, Verdict

# What happens on several ranks at once, such as the same error on all, counts as one reason. The
# launcher soon kills the others of a machine where a process has ended, which is no reason.
GRACE_SECONDS = 1.0
GRACE_SECONDS_AFTER_DEATH = 0.05
FLUSH_SECONDS = 5.0


def end_process(code: int) -> NoReturn:
    """End this process at once, also if its main thread waits for another rank in a collective.

    Nothing is torn by that: checkpoints and the reference store become valid by one rename.
    """
    # A reader that doesn't read must not keep the process from ending.
    timer = threading.Timer(FLUSH_SECONDS, os._exit, [code])
    timer.daemon = True
    timer.start()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def print_error(text: str) -> None:
    """Print on stderr."""
    print(text, file=sys.stderr, flush=True)


class Watcher(threading.Thread):
    """A thread that ends this process when the run can't go on.

    Args:
        member: this rank.
        num_ranks: ranks of the run.
        timeout: seconds of silence after which a rank counts as lost.
        say: prints the reason.
        end: ends the process with an exit code.

    Attributes:
        member: this rank.
        num_ranks: ranks of the run.
        timeout: seconds of silence after which a rank counts as lost.
        connected: set when this rank can tell others what happens to it, or never can.
    """

    def __init__(
        self,
        member: Member,
        num_ranks: int,
        timeout: float,
        say: Callable[[str], None] = print_error,
        end: Callable[[int], object] = end_process,
    ) -> None:
        super().__init__(name="dpofast-ranks", daemon=True)
        self.member, self.num_ranks, self.timeout = member, num_ranks, timeout
        self.connected = threading.Event()
        self._say, self._end = say, end
        self._failed = self._finished = False
        self._verdict: Verdict | None = None
        self._settled = threading.Event()
        self._events: list[Event] = []
        self._deadline: float | None = None
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waker, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._woken, selectors.EVENT_READ, self._obey)

    # For the main thread

    def fail(self, event: Event, wait: float) -> Verdict | None:
        """Tell all ranks that this one has failed, and wait until somebody has said so.

        Args:
            event: what happened.
            wait: seconds to wait at most.

        Returns:
            Why the run ends, which has been printed; None if nobody has told this rank.
        """
        self._failed = True
        self._command(lambda: self._own_event(event))
        self._settled.wait(wait)
        return self._verdict

    def finish(self, wait: float) -> None:
        """Tell all ranks that this one has done its work and ends."""
        self._finished = True
        self._command(self._say_goodbye)
        self.join(wait)

    def set_timeout(self, timeout: float) -> None:
        """Change the seconds of silence after which a rank counts as lost."""
        self._command(lambda: self._keep_alive(timeout))

    def close(self) -> None:
        """Close this process's ends of all connections, without a word; for forked children."""
        self._waker.close()
        self._woken.close()

    # For the thread

    def _command(self, command: Callable[[], None]) -> None:
        self._commands.put(command)
        self._waker.send(b"x")

    def _obey(self) -> None:
        self._woken.recv(1 << 10)
        while not self._commands.empty():
            self._commands.get()()

    def _own_event(self, event: Event) -> None:
        raise NotImplementedError

    def _say_goodbye(self) -> None:
        raise NotImplementedError

    def _keep_alive(self, timeout: float) -> None:
        self.timeout = timeout

    def _add(self, event: Event) -> None:
        self._events.append(event)
        grace = GRACE_SECONDS_AFTER_DEATH if event.kind is Kind.GONE else GRACE_SECONDS
        deadline = time.monotonic() + grace
        self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)

    def _is_due(self) -> bool:
        """Whether it's time to say why the run ends."""
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _handle_some(self, until: float | None = None) -> None:
        """Wait for something to happen, at most until the deadline, and handle it."""
        ends = [end for end in (self._deadline, until) if end is not None]
        wait = max(0.0, min(ends) - time.monotonic()) if ends else None
        for key, _ in self._selector.select(wait):
            key.data()

    def _conclude(self, verdict: Verdict) -> None:
        """Let the main thread end if it has failed; otherwise end the process."""
        self._verdict = verdict
        self._settled.set()
        if not self._failed and not self._finished:
            self._end(RankError.exit_code)
