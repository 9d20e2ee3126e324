"""The watch of this process: starts with the run, and ends with the process.

Each rank but 0 keeps a connection to rank 0 (`dpofast/ranks/wire.py`). When a rank fails or is
lost, rank 0 tells all others why, one rank on each node prints it, and all end. When rank 0 is
lost, each rank finds that out by itself.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing.util
import os
import sys
import threading
import traceback
from functools import partial
from typing import Any

from dpofast.errors import DPOFastError, RankError, StoppedBySignal, one_line
from dpofast.ranks.broken import follows_from_another_rank
from dpofast.ranks.hub import Hub
from dpofast.ranks.meeting import invite, meet, open_store
from dpofast.ranks.member import Member, num_ranks
from dpofast.ranks.spoke import Spoke
from dpofast.ranks.verdict import Event, Kind
from dpofast.ranks.watcher import Watcher, end_process

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT = 20.0
CONNECT_SECONDS = 30.0  # for a rank that fails while another still starts
VERDICT_SECONDS = 10.0
GOODBYE_SECONDS = 5.0

INTERRUPTED = "interrupted"  # what the user is told about Ctrl-C

_watchers: list[Watcher] = []  # the watcher of this process; empty before and after the run
_stores: list[Any] = []
_stops: list[StoppedBySignal] = []  # what ends this process; Python doesn't keep a SystemExit


def watch_ranks(timeout: float = DEFAULT_TIMEOUT) -> None:
    """Watch the other ranks of the run from here on, if there are any.

    Returns at once; the ranks meet in the background. A second call changes the timeout.

    Args:
        timeout: seconds of silence after which a rank counts as lost; 0 ends the watch.
    """
    if timeout <= 0:
        end_watch()
    elif _watchers:
        _watchers[0].set_timeout(timeout)
    elif num_ranks() > 1:
        _watchers.append(_start(Member.of_environment(), num_ranks(), timeout))


def end_watch() -> None:
    """Say goodbye to the other ranks: this one has done its work."""
    while _watchers:
        _watchers.pop().finish(GOODBYE_SECONDS)


def note_stop(stopped: StoppedBySignal) -> None:
    """Note that a signal ends this rank; at its end, the others hear of it.

    Args:
        stopped: what the training has raised. With a checkpoint, all ranks end together, and none
            has to hear of it.
    """
    if stopped.checkpoint is None:
        _stops.append(stopped)


def stop_text(stopped: StoppedBySignal) -> str:
    """What the user is told about a rank that a signal has ended before the first step."""
    return f"ended by {stopped.signum.name}"


def report_failure(text: str, error: BaseException, code: int) -> int | None:
    """Tell all ranks that this one ends with an error.

    Args:
        text: what the user is told.
        error: the error. The traceback of one that isn't dpofast's own is printed.
        code: the exit code of the error.

    Returns:
        The exit code to end with, if the user has been told: that of the error, or RankError's if
        the error only follows from another rank's. None if nobody has told the user.
    """
    ours = DPOFastError | KeyboardInterrupt | StoppedBySignal
    is_ours = isinstance(error, ours)
    detail = "" if is_ours else "".join(traceback.format_exception(error))
    return _report(_kind(error, is_ours), text, detail, code)


def _kind(error: BaseException, is_ours: bool) -> Kind:
    if follows_from_another_rank(error):
        return Kind.BROKEN
    return Kind.ERROR if is_ours else Kind.BUG


def _report(kind: Kind, text: str, detail: str, code: int) -> int | None:
    if not _watchers:
        return None
    watcher = _watchers.pop()
    if not watcher.connected.wait(CONNECT_SECONDS):
        return None
    verdict = watcher.fail(Event(watcher.member, kind, text, detail), VERDICT_SECONDS)
    if verdict is None:
        return None
    return code if verdict.blames(watcher.member.rank) else RankError.exit_code


def _start(member: Member, ranks: int, timeout: float) -> Watcher:
    import torch.distributed  # noqa: F401  here, as a thread shouldn't be the first to import it

    watcher: Watcher
    if member.rank == 0:
        watcher = hub = Hub(member, ranks, timeout)
        threading.Thread(target=_invite, args=[hub], daemon=True).start()
    else:
        watcher = Spoke(partial(meet, open_store), member, ranks, timeout)
    watcher.start()
    process = os.getpid()
    os.register_at_fork(after_in_child=partial(_forget, watcher))
    # The second is for processes that multiprocessing has spawned, which run no atexit handlers.
    atexit.register(_at_exit, process)
    multiprocessing.util.Finalize(None, _at_exit, args=(process,), exitpriority=100)
    return watcher


def _invite(hub: Hub) -> None:
    try:
        store = open_store()
        invite(store, hub)
    except (OSError, RuntimeError, ValueError) as error:
        logger.error(
            "rank_timeout: the ranks can't meet, so a lost one won't be noticed: %s", error
        )
        return
    _stores.append(store)  # it lives in this process, and others may read it later


def _forget(watcher: Watcher) -> None:
    """In a forked child: the connections are its parent's, and must end with the parent."""
    watcher.close()
    _watchers.clear()


def _at_exit(process: int) -> None:
    """Say how this process ends: with an exception that nobody has caught, or in peace."""
    if os.getpid() != process or not _watchers:
        return
    error = _uncaught()
    if error is None:
        end_watch()
        return
    # Python has printed the traceback, or is about to.
    match error:
        case DPOFastError():
            kind, text, code = _kind(error, True), one_line(error), error.exit_code
        case StoppedBySignal():
            kind, text, code = Kind.ERROR, stop_text(error), 128 + error.signum
        case KeyboardInterrupt():
            kind, text, code = Kind.ERROR, INTERRUPTED, 130
        case _:
            kind, code = _kind(error, False), 1
            text = f"{type(error).__name__}: {one_line(error)}"
    final = _report(kind, text, "", code)
    if final == RankError.exit_code:
        end_process(final)


def _uncaught() -> BaseException | None:
    error = getattr(sys, "last_value", None) or sys.exc_info()[1]
    if error is None and _stops:
        return _stops[-1]
    if isinstance(error, SystemExit) and error.code in (None, 0):
        return None
    if isinstance(error, StoppedBySignal) and error.checkpoint is not None:
        return None  # all ranks end together
    return error
