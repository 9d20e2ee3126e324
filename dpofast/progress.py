"""Progress bars on a terminal and in notebooks; lines, some seconds apart, in log files."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

from tqdm import auto
from tqdm.std import tqdm

LINE_SECONDS = 15.0  # least time between two lines of one bar


class _Lines:
    """Methods of a bar that writes whole lines. They come before those of its tqdm class."""

    started = line_written = 0.0  # times of the start and of the last line; equal before the first
    ends_with_line = False  # whether a short bar has a line, too

    def display(self, msg: Any = None, pos: Any = None) -> bool:
        """Write a line, unless the last one was just before."""
        if time.monotonic() - self.line_written >= LINE_SECONDS:
            self._write_line()
        return True

    def clear(self, nolock: bool = False) -> None:
        """Do nothing: a line stays."""

    def moveto(self, n: int) -> None:
        """Do nothing: the lines of several bars follow each other."""

    def close(self) -> None:
        """Write the last line, if there were others before it, and close the bar."""
        bar: Any = self
        if not getattr(bar, "disable", True):
            had_lines = self.line_written > self.started
            if had_lines or (self.ends_with_line and bar.n):
                bar._ema_dt = lambda: None  # the rate of the whole, as in tqdm's own last line
                self._write_line()
            bar.sp = None  # tqdm writes nothing on its own then
        super().close()  # type: ignore[misc]

    def start(self) -> None:
        self.started = self.line_written = time.monotonic()

    def _write_line(self) -> None:
        bar: Any = self
        self.line_written = time.monotonic()
        if os.environ.get("RANK", "0") == "0":
            bar.fp.write(tqdm.format_meter(**{**bar.format_dict, "ncols": 0}).strip() + "\n")
            bar.fp.flush()


@contextlib.contextmanager
def bars_as_lines() -> Iterator[None]:
    """Inside the `with` block, a new bar writes lines if its stream isn't a terminal.

    This holds for the bars of all libraries that use tqdm, such as datasets and transformers. A
    bar writes at most one line in LINE_SECONDS, and none if it ends before the first is due. Only
    rank 0 writes lines. In notebooks, and on a terminal, bars stay as they are.
    """
    if any(kind.__name__ == "tqdm_notebook" for kind in auto.tqdm.__mro__):
        yield
        return
    given = tqdm.__init__

    def with_lines(bar: Any, *args: Any, **kwargs: Any) -> None:
        # With a delay, tqdm doesn't draw the bar from inside its constructor.
        given(bar, *args, **{"delay": 1e-9, **kwargs})
        if not (bar.disable or _is_terminal(bar.fp) or isinstance(bar, _Lines)):
            bar.__class__ = type(f"Lines{type(bar).__name__}", (_Lines, type(bar)), {})
            bar.mininterval = max(bar.mininterval, 1.0)  # seconds between two looks at the time
            bar.start()

    tqdm.__init__ = with_lines
    try:
        yield
    finally:
        tqdm.__init__ = given


def _is_terminal(stream: Any) -> bool:
    isatty = getattr(stream, "isatty", None)
    return isatty is not None and bool(isatty())


def progress_bar(**options: Any) -> Any:
    """Make one of dpofast's own bars, with tqdm's options; in a log, its end is always a line."""
    with bars_as_lines():
        bar = auto.tqdm(**options)
    if isinstance(bar, _Lines):
        bar.ends_with_line = True
    return bar
