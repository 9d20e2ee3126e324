"""Catches the signals that end a run, and lets a second one end the process at once.

Python runs a signal's handler in the main thread, once the C code that runs there has returned. A
rank that waits for another one, which may be dead, would never get there. So a thread reads the
signals, too, by way of a pipe into which Python writes each of them as it arrives.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any, Self

from dpofast.errors import StoppedBySignal

logger = logging.getLogger(__name__)

# Launchers pass on what their ranks may have got already, as from a terminal or from SLURM. Within
# this many seconds of the first signal, another one is taken for the same.
SAME_SECONDS = 1.0
READING_SECONDS = 0.2  # for the thread to read a signal that the main thread handles already
_END = b"\0"  # no signal has this number


class SignalWatch:
    """Context manager that catches signals; the handlers of before are back afterwards.

    A signal that is ignored, or for which the script has a handler of its own, stays so. In
    another thread than the main one nothing is caught, as Python doesn't allow it there.

    Args:
        signals: the signals.
        note: called in the main thread with the first signal.
        say: called in another thread with the first signal, as soon as it arrives.

    Attributes:
        received: the first signal; None so far.
        only_notes: whether the first signal is only noted. Otherwise it raises StoppedBySignal or,
            for Ctrl-C, KeyboardInterrupt.
    """

    def __init__(
        self,
        signals: Sequence[signal.Signals],
        note: Callable[[signal.Signals], None],
        say: Callable[[signal.Signals], None],
    ) -> None:
        self.received: signal.Signals | None = None
        self.only_notes = False
        self._signals, self._note, self._say = signals, note, say
        self._has_second = False  # set by the thread
        self._previous: dict[signal.Signals, Any] = {}
        self._thread: threading.Thread | None = None
        self._pipe = (-1, -1)
        self._other_pipe = -1  # where another library, such as asyncio, wants the signals

    def __enter__(self) -> Self:
        if not self._signals:
            return self
        if threading.current_thread() is not threading.main_thread():
            logger.debug("Training runs in a thread, so save_on_signal has no effect.")
            return self
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._other_pipe = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._read, name="dpofast-signals", daemon=True)
        self._thread.start()
        _active.append(self)
        for each in self._signals:
            previous = signal.getsignal(each)
            if previous in (signal.SIG_DFL, signal.default_int_handler):
                self._previous[each] = previous
                signal.signal(each, self._handle)
            else:
                logger.debug("%s is left to the handler that it has.", each.name)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._thread is None:
            return
        self.restore()
        signal.set_wakeup_fd(self._other_pipe, warn_on_full_buffer=False)
        _active.remove(self)
        os.write(self._pipe[1], _END)
        self._thread.join()
        self._thread = None
        self.close()

    def close(self) -> None:
        """Close this process's ends of the pipe."""
        for end in self._pipe:
            os.close(end)

    def restore(self) -> None:
        """Give back each signal whose handler is still ours to the handler of before."""
        for each, previous in self._previous.items():
            if signal.getsignal(each) == self._handle:
                signal.signal(each, previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        received = signal.Signals(number)
        if self.received is not None:
            if received is signal.SIGINT and self._is_second():
                raise KeyboardInterrupt
            return
        self.received = received
        self._note(received)
        if not self.only_notes:
            raise KeyboardInterrupt if received is signal.SIGINT else StoppedBySignal(received)

    def _is_second(self) -> bool:
        """Whether a second signal has arrived, and not the first one again.

        The thread knows when each arrived; the handler runs after a long call in C.
        """
        end = time.monotonic() + READING_SECONDS
        while not self._has_second and time.monotonic() < end:
            time.sleep(0.01)
        return self._has_second

    def _read(self) -> None:
        """The thread: speaks at the first signal, and ends the process at the second."""
        first: float | None = None
        while (byte := os.read(self._pipe[0], 1)) != _END:
            if self._other_pipe >= 0:
                with suppress(OSError):
                    os.write(self._other_pipe, byte)
            number = byte[0]
            if number not in self._previous:  # another signal for which Python has a handler
                continue
            now = time.monotonic()
            if first is None:
                first = now
                self._say(signal.Signals(number))
            elif now - first > SAME_SECONDS:
                self._has_second = True
                # Ctrl-C again raises KeyboardInterrupt: a notebook's process goes on living.
                if number != signal.SIGINT:
                    os._exit(128 + number)


_active: list[SignalWatch] = []


def _forget_in_child() -> None:
    """In a forked process, undo what its parent has set: it has no checkpoint to save."""
    for watch in _active:
        signal.set_wakeup_fd(-1)
        watch.restore()
        watch.close()
    _active.clear()


os.register_at_fork(after_in_child=_forget_in_child)


def ignore_signals(signals: Sequence[signal.Signals], worker: int) -> None:
    """In a data loader's worker process, ignore signals that only the trainer acts on.

    A signal to a whole group of processes, as from a terminal or a launcher, reaches the workers,
    too. Without them the trainer couldn't finish its step.

    Args:
        signals: the signals.
        worker: number of the worker, which PyTorch passes.
    """
    for each in signals:
        if each is not signal.SIGTERM:
            signal.signal(each, signal.SIG_IGN)
        elif hasattr(signal, "sigwaitinfo"):
            # The trainer's process ends its workers with SIGTERM, and waits until they are gone.
            signal.pthread_sigmask(signal.SIG_BLOCK, {each})
            threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass  # not from the trainer's process
    os._exit(0)
