"""Renders pairs in a process of their own, so that a chat template can be stopped.

Templates come with models, and run as programs: one can loop without an end, or write gigabytes.
No limit within this process would hold for all that a template can do (`"a" * 10**10` is a single
call), so the rows are rendered in a fork of it. Linux ends that fork if a row takes too long, and
refuses it further memory.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import resource
import signal
import sys
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from dpofast.data.reading.row_error import RowError
from dpofast.data.tokens.boundary import PairTexts
from dpofast.data.tokens.render import TokenizerError, render_pair_texts

Row = Mapping[str, Any]  # of the normal form

_COLUMNS = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs", "plain_prompt")
_MB = 1_000_000
_REMEDY = "mend the template or give another one"


@dataclass(frozen=True)
class TemplateLimits:
    """What a chat template may use for one pair.

    Attributes:
        seconds: time for all texts of the pair.
        memory: bytes beyond those that the process had before.
        characters: length of each text, beside `per_character`.
        per_character: characters that it may write for each one of the pair's messages.
    """

    seconds: float = 30.0
    memory: int = 2_000 * _MB
    characters: int = _MB
    per_character: int = 10


class PairRenderer:
    """Makes the texts of pairs; a chat template runs within limits, wherever Linux forks.

    The process is started when it is first needed, and ends with `close`. A copy in another process
    starts its own.

    Args:
        tokenizer: a transformers tokenizer; None if no pair is text.
        limits: what its template may use.
    """

    def __init__(self, tokenizer: Any, limits: TemplateLimits | None = None) -> None:
        self.tokenizer, self.limits = tokenizer, limits or TemplateLimits()
        self._child: _Child | None = None

    def __reduce__(self) -> tuple[type[PairRenderer], tuple[Any, TemplateLimits]]:
        return PairRenderer, (self.tokenizer, self.limits)

    def texts(self, row: Row) -> PairTexts:
        """The texts of one row.

        Raises:
            RowError: it has none.
        """
        (texts,) = self.all_texts([row])
        if isinstance(texts, RowError):
            raise texts
        return texts

    def all_texts(self, rows: Sequence[Row]) -> list[PairTexts | RowError]:
        """The texts of each row, or what is wrong with it. After a TokenizerError, rows end.

        Raises:
            Exception: whatever else a tokenizer of one's own raises.
        """
        has_template = bool(getattr(self.tokenizer, "chat_template", None))
        if sys.platform != "linux" or not has_template or isinstance(rows[0]["prompt"], str):
            return _up_to_fault(_texts(row, self.tokenizer) for row in rows)
        if self._child is None or self._child.parent != os.getpid():
            self._child = _Child(self.tokenizer, self.limits)
        self._child.send([{c: row[c] for c in _COLUMNS if c in row} for row in rows])
        results = _up_to_fault(self._child.receive() for _ in rows)
        if isinstance(results[-1], TokenizerError):
            self.close()  # it may have ended, or have sent results that nobody has read
        return results

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
        with warnings.catch_warnings():
            # Python warns of forks beside threads. This one runs Python code only, and no thread.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._pid = os.fork()
        if self._pid == 0:
            self._connection.close()
            _serve_and_exit(theirs, tokenizer, limits)
        theirs.close()
        self.end = weakref.finalize(self, _end, self._connection, self._pid, self.parent)

    def send(self, rows: list[dict[str, Any]]) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended; `receive` says why
            self._connection.send(rows)

    def receive(self) -> PairTexts | RowError:
        """The next result; a TokenizerError if the process had to be ended.

        Raises:
            Exception: what rendering has raised.
        """
        result: Any = None
        try:
            if self._connection.poll(2 * self.limits.seconds + 10):
                result = self._connection.recv()
        except (EOFError, OSError):
            # It ends a moment after its connection. Without this wait, `end` would kill it first.
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)
        if isinstance(result, PairTexts | RowError):
            return result
        if result is not None:
            self.end()
            raise result
        ended_by = self.end() or signal.SIGKILL
        of_name = _of_name(self.tokenizer)
        if ended_by == signal.SIGALRM:
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


def _serve_and_exit(connection: Connection, tokenizer: Any, limits: TemplateLimits) -> None:
    """Render what comes in, in the new process, until the connection is closed."""
    try:
        # Objects that this process inherited must not be finalised twice.
        gc.freeze()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, whatever it does
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
        _limit_memory(limits.memory)
        while True:
            for row in connection.recv():
                signal.setitimer(signal.ITIMER_REAL, limits.seconds)
                result = _within_limits(row, tokenizer, limits)
                signal.setitimer(signal.ITIMER_REAL, 0)
                connection.send(result)
    except (EOFError, OSError):
        pass
    finally:
        os._exit(0)  # nothing of the parent is flushed or cleaned up


def _limit_memory(more: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = pages * resource.getpagesize() + more
    if hard == resource.RLIM_INFINITY or soft < hard:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _within_limits(row: Row, tokenizer: Any, limits: TemplateLimits) -> Any:
    """The texts of a row, or the exception that they raise."""
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
    given = sum(len(text) for value in row.values() for text in _strings(value))
    most = limits.characters + limits.per_character * given
    longest = max(len(texts.prompt), *map(len, texts.wholes))
    if longest > most:
        return TokenizerError(
            f"the chat template{_of_name(tokenizer)} writes {longest:,} characters for a pair that "
            f"has {given:,}, and at most {most:,} are taken; {_REMEDY}"
        )
    return texts


def _strings(value: Any) -> Sequence[str]:
    """The strings of a column of the normal form: messages, or one text."""
    return value if isinstance(value, list) else [value or ""]


def _texts(row: Row, tokenizer: Any) -> PairTexts | RowError:
    try:
        return render_pair_texts(row, tokenizer)
    except RowError as error:
        return error


def _up_to_fault(results: Iterable[PairTexts | RowError]) -> list[PairTexts | RowError]:
    """The results up to the first TokenizerError, which all further rows would give as well."""
    found: list[PairTexts | RowError] = []
    for result in results:
        found.append(result)
        if isinstance(result, TokenizerError):
            break
    return found


def _of_name(tokenizer: Any) -> str:
    name = getattr(tokenizer, "name_or_path", "")
    return f" of {name!r}" if name else ""
