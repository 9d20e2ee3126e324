"""What is caught, what is said, and that everything is as before afterwards."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import threading
import time
from contextlib import nullcontext

import pytest

from dpofast.errors import StoppedBySignal
from dpofast.train.signals import watch as watch_module
from dpofast.train.signals.watch import SignalWatch, ignore_signals

SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]


def handlers():
    return [signal.getsignal(each) for each in SIGNALS]


@pytest.fixture(autouse=True)
def same_process_afterwards():
    before = handlers()
    yield
    assert handlers() == before
    assert signal.set_wakeup_fd(-1) == -1
    assert not any(thread.name == "dpofast-signals" for thread in threading.enumerate())


def watch_of(noted, said):
    return SignalWatch(SIGNALS, noted.append, said.append)


def wait_for(found, count):
    deadline = time.monotonic() + 10
    while len(found) < count and time.monotonic() < deadline:
        time.sleep(0.01)


def test_the_first_signal_is_noted_and_said_once():
    noted, said = [], []
    with watch_of(noted, said) as watch:
        watch.only_notes = True
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)  # soon enough to be the same one
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(said, 1)
    assert noted == said == [watch.received] == [signal.SIGUSR1]


@pytest.mark.parametrize(("after", "is_second"), [(0.01, False), (0.15, True)])
def test_what_counts_is_when_ctrl_c_arrives_again(monkeypatch, after, is_second):
    """Not when Python handles it: that is after the long call in C that runs just then."""
    monkeypatch.setattr(watch_module, "SAME_SECONDS", 0.1)
    again = threading.Timer(after, os.kill, [os.getpid(), signal.SIGINT])
    handled = []

    def run():
        with watch_of([], []) as watch:
            watch.only_notes = True
            os.kill(os.getpid(), signal.SIGINT)
            again.start()
            hashlib.pbkdf2_hmac("sha256", b"", b"", 500_000)
            again.join()  # on a fast machine, the signal must not come after the watch has ended
            time.sleep(0.01)
            handled.append(watch.received)

    with pytest.raises(KeyboardInterrupt) if is_second else nullcontext():
        run()
    assert handled == ([] if is_second else [signal.SIGINT])


@pytest.mark.parametrize(
    ("sent", "error"), [(signal.SIGTERM, StoppedBySignal), (signal.SIGINT, KeyboardInterrupt)]
)
def test_before_the_first_step_it_ends_the_run_at_once(sent, error):
    def run():
        with watch_of([], []):
            os.kill(os.getpid(), sent)
            pytest.fail("the signal hasn't raised")

    with pytest.raises(error):
        run()


def test_a_handler_of_the_scripts_own_stays_and_so_does_an_ignored_signal():
    own, noted = [], []
    previous = signal.signal(signal.SIGUSR1, lambda *_: own.append("own"))
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with watch_of(noted, []):
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGUSR1, previous)
        signal.signal(signal.SIGINT, ignored)
    assert (own, noted) == (["own"], [])


def test_a_handler_that_was_set_meanwhile_is_kept():
    def later(*_):
        """Set by a script while it trains."""

    with watch_of([], []):
        signal.signal(signal.SIGUSR1, later)
    assert signal.getsignal(signal.SIGUSR1) is later
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def test_in_another_thread_nothing_is_caught():
    seen = []

    def run():
        with watch_of([], []):
            seen.append(handlers())

    before = handlers()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]


def test_without_signals_nothing_is_caught():
    before = handlers()
    with SignalWatch([], print, print):
        assert handlers() == before


def test_another_library_that_reads_signals_still_gets_them():
    reading, writing = socket.socketpair()
    reading.settimeout(10)
    writing.setblocking(False)
    signal.set_wakeup_fd(writing.fileno())
    with watch_of([], []) as watch:
        watch.only_notes = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert reading.recv(1) == bytes([signal.SIGTERM])
    assert signal.set_wakeup_fd(-1) == writing.fileno()
    reading.close()
    writing.close()


def status_of_child(run, *sent, seconds=0.3):
    """How a forked child ends that runs a function and then waits for signals, or for its end."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        run()
        os.write(writing, b".")
        time.sleep(seconds)
        os._exit(0)
    os.read(reading, 1)
    for each in sent:
        os.kill(child, each)
    os.close(reading)
    os.close(writing)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_forked_process_has_its_own_signals():
    noted, said = [], []
    with watch_of(noted, said) as watch:
        watch.only_notes = True
        assert status_of_child(lambda: None, signal.SIGTERM) == -signal.SIGTERM
    assert noted == said == []


def test_workers_obey_only_their_parent():
    def run():
        ignore_signals(SIGNALS, 0)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)  # from itself, as from a launcher
        while signal.SIGTERM in signal.sigpending():  # the next one would merge with it
            time.sleep(0.01)

    assert status_of_child(run, signal.SIGINT, signal.SIGUSR1) == 0
    started = time.monotonic()
    assert status_of_child(run, signal.SIGTERM, seconds=60.0) == 0
    assert time.monotonic() - started < 30
