"""Renders rows in a process of their own, so that a chat template can be stopped.

Templates come with models, and run as programs: one can loop without an end, or write gigabytes.
No limit within this process would hold for all that a template can do (`"a" * 10**10` is a single
call), so the rows are rendered in a fork of it. Linux ends that fork if a row takes too long, and
refuses it further memory. The two processes exchange many rows at a time, as a message for each row
would cost about as much as rendering it. A number in shared memory says which row the fork is at.
"""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import pickle
import resource
import signal
import struct
import sys
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from dpofast.columns import PAIRED, PLACES_COLUMN, RANKED, UNPAIRED
from dpofast.data.reading.row_error import RowError
from dpofast.data.tokens.boundary import RowTexts
from dpofast.data.tokens.render import TokenizerError, render_row_texts

Row = Mapping[str, Any]  # of the normal form

_COLUMNS = (
    *(*PAIRED.columns, *UNPAIRED.answers, *RANKED.answers),
    *(PLACES_COLUMN, "tools", "chat_template_kwargs", "plain_prompt"),
)
_MB = 1_000_000
_AT = struct.Struct("Q")  # the row that is being rendered
_CHARACTERS = 4 * _MB  # that are sent at once; the process doesn't keep more
# A signal to all processes of a job is for the parent, which may save a checkpoint first.
_FOR_PARENT = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)
_REMEDY = "mend the template or give another one"


@dataclass(frozen=True)
class TemplateLimits:
    """What a chat template may use for one row.

    Attributes:
        seconds: processor time for all texts of the row. Time in which the process is stopped, as
            by Ctrl-Z, doesn't count.
        memory: bytes beyond those that the process had before.
        characters: length of each text, beside `per_character`.
        per_character: characters that it may write for each one of the row's messages.
    """

    seconds: float = 30.0
    memory: int = 2_000 * _MB
    characters: int = _MB
    per_character: int = 10


class RowRenderer:
    """Makes the texts of rows; a chat template runs within limits, wherever Linux forks.

    The process is started when it is first needed, and ends with `close`. A copy in another process
    starts its own.

    Args:
        tokenizer: a transformers tokenizer; None if no row is text.
        limits: what its template may use.
    """

    def __init__(self, tokenizer: Any, limits: TemplateLimits | None = None) -> None:
        self.tokenizer, self.limits = tokenizer, limits or TemplateLimits()
        self._child: _Child | None = None

    def __reduce__(self) -> tuple[type[RowRenderer], tuple[Any, TemplateLimits]]:
        return RowRenderer, (self.tokenizer, self.limits)

    def texts(self, row: Row) -> RowTexts:
        """The texts of one row.

        Raises:
            RowError: it has none.
        """
        (texts,) = self.all_texts([row])
        if isinstance(texts, RowError):
            raise texts
        return texts

    def all_texts(self, rows: Sequence[Row]) -> list[RowTexts | RowError]:
        """The texts of each row, or what is wrong with it. After a TokenizerError, rows end.

        Raises:
            Exception: whatever else a tokenizer of one's own raises.
        """
        has_template = bool(getattr(self.tokenizer, "chat_template", None))
        if sys.platform != "linux" or not has_template or isinstance(rows[0]["prompt"], str):
            return _up_to_fault(_texts(row, self.tokenizer) for row in rows)
        if self._child is None or self._child.parent != os.getpid():
            self._child = _Child(self.tokenizer, self.limits)
        found = self._child.render(rows)
        if isinstance(found, list):
            return found
        self.close()
        row, fault = found
        # The texts of the rows before it are lost with the process.
        before = self.all_texts(rows[:row]) if row else []
        return before if before and isinstance(before[-1], TokenizerError) else [*before, fault]

    def close(self) -> None:
        """End the process, if there is one."""
        if self._child is not None and self._child.parent == os.getpid():
            self._child.end()
        self._child = None


class _Child:
    """The process that renders, seen from the one that has started it."""

    def __init__(self, tokenizer: Any, limits: TemplateLimits) -> None:
        self.parent, self.limits, self.tokenizer = os.getpid(), limits, tokenizer
        self._connection, theirs = Pipe()
        self._at = mmap.mmap(-1, _AT.size)
        # The new process must not run the parent's handlers, not even before it has its own.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_PARENT)
        try:
            with warnings.catch_warnings():
                # Python warns of forks beside threads. This one runs Python code only, and no
                # thread.
                warnings.simplefilter("ignore", DeprecationWarning)
                self._pid = os.fork()
            if self._pid == 0:
                _serve_and_exit(theirs, self._connection, self._at, tokenizer, limits)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        theirs.close()
        self.end = weakref.finalize(self, _end, self._connection, self._pid, self.parent)

    def render(self, rows: Sequence[Row]) -> list[RowTexts | RowError] | tuple[int, RowError]:
        """The texts of rows, up to a TokenizerError; or the row at which the process has ended.

        Raises:
            Exception: what rendering has raised.
        """
        _AT.pack_into(self._at, 0, 0)
        with contextlib.suppress(BrokenPipeError):  # it has ended; `_receive` says why
            self._connection.send([{c: row[c] for c in _COLUMNS if c in row} for row in rows])
        found: list[RowTexts | RowError] = []
        while len(found) < len(rows) and not isinstance(found and found[-1], TokenizerError):
            results = self._receive()
            if results is None:
                (row,) = _AT.unpack_from(self._at)
                return row, self._fault()
            for result in results:
                if isinstance(result, tuple):
                    found.append(RowTexts(*result))
                elif isinstance(result, RowError):
                    found.append(result)
                else:
                    self.end()
                    raise result
        return found

    def _receive(self) -> list[Any] | None:
        """What the process sends; None if it has ended, or doesn't get on with a row."""
        waited, at = 0, self._at[:]
        try:
            # Seconds are counted one by one, as this process may be stopped for any time.
            while not self._connection.poll(1.0):
                waited = waited + 1 if at == self._at[:] else 0
                at = self._at[:]
                if waited > 2 * self.limits.seconds + 10:
                    return None
            results: list[Any] = self._connection.recv()
            return results
        except (EOFError, OSError):
            # It ends a moment after its connection. Without this wait, `end` would kill it first.
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)
            return None

    def _fault(self) -> TokenizerError:
        """Why the process has ended, or had to be ended."""
        ended_by = self.end() or signal.SIGKILL
        of_name = _of_name(self.tokenizer)
        if ended_by == signal.SIGPROF:
            return TokenizerError(
                f"the chat template{of_name} took more than {self.limits.seconds:g} s for this "
                f"pair, so it was stopped; {_REMEDY}"
            )
        return TokenizerError(
            f"the process that runs the chat template{of_name} was ended by signal {ended_by}, "
            f"perhaps because the machine has no memory left; {_REMEDY}"
        )


def _end(connection: Connection, pid: int, parent: int) -> int:
    """End the process; the signal that had ended it before, or 0."""
    if os.getpid() != parent:  # a fork of the parent has a copy of this object
        return 0
    connection.close()
    try:
        found, status = os.waitpid(pid, os.WNOHANG)
        if not found:
            # It ends by itself when its connection is closed, but not while it renders.
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return 0
    except (ChildProcessError, ProcessLookupError):  # somebody else has waited for it
        return 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def _serve_and_exit(
    connection: Connection,
    of_parent: Connection,
    at: mmap.mmap,
    tokenizer: Any,
    limits: TemplateLimits,
) -> None:
    """Render what comes in, in the new process, until the parent closes its connection."""
    try:
        of_parent.close()
        # Objects that this process inherited must not be finalised twice.
        gc.freeze()
        for number in _FOR_PARENT:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, whatever it does
        _limit_memory(limits.memory)
        while True:
            _serve(connection.recv(), connection, at, tokenizer, limits)
    except (EOFError, OSError):
        pass
    finally:
        os._exit(0)  # nothing of the parent is flushed or cleaned up


def _serve(
    rows: list[Row], connection: Connection, at: mmap.mmap, tokenizer: Any, limits: TemplateLimits
) -> None:
    """Render rows up to a TokenizerError, and send what comes of them in some messages."""
    results, size = [], 0
    for index, row in enumerate(rows):
        _AT.pack_into(at, 0, index)
        signal.setitimer(signal.ITIMER_PROF, limits.seconds)
        result = _within_limits(row, tokenizer, limits)
        results.append(result)
        size += sum(map(len, (result[0], *result[1]))) if isinstance(result, tuple) else 0
        ends = isinstance(result, TokenizerError)
        if ends or size > _CHARACTERS or index == len(rows) - 1:
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.send(results)
            results, size = [], 0
        if ends:
            break


def _limit_memory(more: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = pages * resource.getpagesize() + more
    if hard == resource.RLIM_INFINITY or soft < hard:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _within_limits(row: Row, tokenizer: Any, limits: TemplateLimits) -> Any:
    """The fields of a row's texts, or the exception that they raise."""
    try:
        texts = _texts(row, tokenizer)
    except MemoryError:
        return TokenizerError(
            f"the chat template{_of_name(tokenizer)} needs more than {limits.memory / _MB:,.0f} MB "
            f"for this pair, so it was stopped; {_REMEDY}"
        )
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return RuntimeError(f"{type(error).__name__}: {error}")
        return error
    if isinstance(texts, RowError):
        return texts
    longest = max(len(texts.prompt), *map(len, texts.wholes))
    if longest > limits.characters:
        given = sum(len(text) for value in row.values() for text in _strings(value))
        most = limits.characters + limits.per_character * given
        if longest > most:
            return TokenizerError(
                f"the chat template{_of_name(tokenizer)} writes {longest:,} characters for a pair "
                f"that has {given:,}, and at most {most:,} are taken; {_REMEDY}"
            )
    # A tuple is pickled several times faster.
    return texts.prompt, texts.wholes, texts.rendered


def _strings(value: Any) -> Iterator[str]:
    """The strings of a column of the normal form: messages, or one text, of an answer or many."""
    if isinstance(value, list):
        for each in value:
            yield from _strings(each)
    else:
        yield value or ""


def _texts(row: Row, tokenizer: Any) -> RowTexts | RowError:
    try:
        return render_row_texts(row, tokenizer)
    except RowError as error:
        return error


def _up_to_fault(results: Iterable[RowTexts | RowError]) -> list[RowTexts | RowError]:
    """The results up to the first TokenizerError, which all further rows would give as well."""
    found: list[RowTexts | RowError] = []
    for result in results:
        found.append(result)
        if isinstance(result, TokenizerError):
            break
    return found


def _of_name(tokenizer: Any) -> str:
    name = getattr(tokenizer, "name_or_path", "")
    return f" of {name!r}" if name else ""
