"""Judges contenders that do the same work, then times the right ones in interleaved rounds.

A contender with a wrong result gets no speed. One that can't run is reported with the reason.
Neither ends the benchmark. benchmarks/memory.py measures memory, and benchmarks/tables.py prints
the figures.
"""

from __future__ import annotations

import argparse
import gc
import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch

TIMED, WRONG, FAILED, ABSENT = "timed", "wrong", "failed", "absent"
FLUSH_BYTES = 2**28  # larger than any L2 cache
# The device waits for about a millisecond while the host queues the call. Without that, a device
# that is faster than the host's Python would wait for it while the clock runs.
SLEEP_CYCLES = 2_000_000

Clock = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True, eq=False)
class Contender:
    """Something that does the work, or the reason why it can't.

    Attributes:
        name: name in the JSON and in the names of ratios.
        run: function of one round, whose result is judged; None if the contender can't run.
        reason: why it can't run.
        note: how its work differs from the other contenders' work.
        judged: whether its result is judged; False for the bare products, which compute no result.
        holding: context of a round, entered before the clock starts and left after it stops. It
            allocates what a round needs beforehand, and frees it for the other contenders.
    """

    name: str
    run: Callable[[], Any] | None = None
    reason: str | None = None
    note: str = ""
    judged: bool = True
    holding: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass(frozen=True)
class Verdict:
    """Errors of one result, and their bounds under the same names."""

    errors: dict[str, float]
    bounds: dict[str, float]

    @property
    def complaint(self) -> str | None:
        """The errors above their bounds, in words; None if there are none. NaN counts as above."""
        beyond = [
            f"{name} {error:.2e}, at most {self.bounds[name]:.2e}"
            for name, error in self.errors.items()
            if not error <= self.bounds[name]
        ]
        return f"error of {'; '.join(beyond)}" if beyond else None


@dataclass(eq=False)
class Result:
    """The outcome of one contender.

    Attributes:
        name: the contender's name.
        note: the contender's note.
        status: "timed", "wrong", "failed" or "absent".
        reason: why it isn't timed.
        verdict: errors and bounds; None if nothing was judged.
        seconds: time of each counted round; empty unless timed.
    """

    name: str
    note: str
    status: str = TIMED
    reason: str | None = None
    verdict: Verdict | None = None
    seconds: list[float] = field(default_factory=list)

    def drop(self, status: str, reason: str) -> None:
        """Take the contender out of the race and forget its times."""
        self.status, self.reason = status, reason
        self.seconds.clear()

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    def as_dict(self) -> dict[str, Any]:
        """The result as it is written to JSON; all times in seconds."""
        verdict = self.verdict
        return {
            "status": self.status,
            "reason": self.reason,
            "note": self.note,
            "median": self.median,
            "p20": quantile(self.seconds, 0.2),
            "p80": quantile(self.seconds, 0.8),
            "rounds": len(self.seconds),
            "seconds": self.seconds,
            "errors": verdict.errors if verdict else None,
            "error_bounds": verdict.bounds if verdict else None,
        }


class AbsentError(Exception):
    """A contender can't run here; the message becomes its reason."""


class TimeLimitError(Exception):
    """A contender exceeded its time limit."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeLimitError in the body after `seconds`, as soon as the running operation ends.

    Works only in the main thread, which gets the signals.
    """

    def on_alarm(_signal: int, _frame: FrameType | None) -> None:
        raise TimeLimitError(f"took longer than {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous)


def wall_clock(run: Callable[[], Any]) -> float:
    """Seconds of one call on a CPU."""
    started = time.perf_counter()
    result = run()
    elapsed = time.perf_counter() - started
    del result  # only now: freeing it is not part of the time
    return elapsed


class CudaClock:
    """Seconds of one call on the current CUDA device, starting with a cold L2 cache."""

    def __init__(self) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def __call__(self, run: Callable[[], Any]) -> float:
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._flush.zero_()
        torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
        start.record()
        result = run()
        end.record()
        end.synchronize()
        del result
        return float(start.elapsed_time(end)) / 1e3


def clock_for(device: str) -> Clock:
    """The clock of a device: "cpu" or "cuda"."""
    return CudaClock() if device == "cuda" else wall_clock


def one_line(error: BaseException) -> str:
    """Class and first line of an error; only the line for an AbsentError."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    line = lines[0].strip()
    return line if isinstance(error, AbsentError) else f"{type(error).__name__}: {line}"


def make_contender(name: str, make: Callable[[], Contender], note: str = "") -> Contender:
    """Call `make`; if it raises, return a contender that can't run, with the reason."""
    try:
        return make()
    except Exception as error:  # a peer's import can raise anything
        return Contender(name, reason=one_line(error), note=note)


def attempt(
    contender: Contender,
    judge: Callable[[Any], Verdict],
    limit_seconds: float,
) -> Result:
    """Run a contender once, compilation included, and judge its result."""
    result = Result(contender.name, contender.note)
    if contender.run is None:
        result.drop(ABSENT, contender.reason or "no reason given")
        return result
    try:
        with contender.holding(), time_limit(limit_seconds):
            given = contender.run()
            _synchronize()
        if contender.judged:
            result.verdict = judge(given)
    except Exception as error:  # a peer can raise anything, and the race goes on
        result.drop(FAILED, one_line(error))
    else:
        if result.verdict is not None and result.verdict.complaint:
            result.drop(WRONG, result.verdict.complaint)
    if result.status == FAILED:
        _free_memory()
    return result


def race(
    contenders: Sequence[Contender],
    attempts: dict[str, Result],
    clock: Clock,
    rounds: int,
    warmup: int,
) -> None:
    """Time all contenders whose attempt was right; each round starts with a different contender.

    Args:
        contenders: all contenders.
        attempts: results of `attempt` by name; seconds and failures are written to them.
        clock: function that times one call.
        rounds: number of rounds that count.
        warmup: number of rounds before those, which don't count.
    """
    # Warm-up rounds have negative numbers.
    for number in range(-warmup, rounds):
        running = [each for each in contenders if attempts[each.name].status == TIMED]
        for contender in rotated(running, number):
            assert contender.run is not None
            result = attempts[contender.name]
            try:
                with contender.holding():
                    elapsed = clock(contender.run)
            except Exception as error:  # a peer can raise anything
                result.drop(FAILED, one_line(error))
            else:
                if number >= 0:
                    result.seconds.append(elapsed)
            if result.status == FAILED:
                _free_memory()


def rotated(items: Sequence[Any], number: int) -> list[Any]:
    """Rotate the items to begin with item `number`, taken modulo the number of items."""
    start = number % len(items) if items else 0
    return [*items[start:], *items[:start]]


def ratios(
    values: dict[str, float | None], reasons: dict[str, str | None], ours: str, suffix: str
) -> tuple[dict[str, float | None], dict[str, str]]:
    """Divide our value by that of every other contender.

    Args:
        values: value of each contender; None if there is nothing to compare.
        reasons: why a contender has no value.
        ours: name of our contender.
        suffix: what is compared; a ratio is named "<contender>_<suffix>".

    Returns:
        The ratios, None if either value is missing, and the reasons for those that are None.
    """
    found: dict[str, float | None] = {}
    why: dict[str, str] = {}
    for name, theirs in values.items():
        if name == ours:
            continue
        key, mine = f"{name}_{suffix}", values[ours]
        found[key] = mine / theirs if mine is not None and theirs else None
        if found[key] is None:
            missing = ours if mine is None else name
            why[key] = f"{missing}: {reasons.get(missing) or 'measured nothing above zero'}"
    return found, why


def time_ratios(
    results: dict[str, Result], ours: str, suffix: str
) -> tuple[dict[str, float | None], dict[str, str]]:
    """The `ratios` of median times."""
    medians = {name: result.median for name, result in results.items()}
    return ratios(medians, {name: r.reason for name, r in results.items()}, ours, suffix)


def worst(all_ratios: Sequence[dict[str, float | None]]) -> dict[str, float | None]:
    """The largest value of each ratio over several cases; None if no case has one."""
    keys = dict.fromkeys(key for each in all_ratios for key in each)
    found = {key: [each.get(key) for each in all_ratios] for key in keys}
    known = {key: [v for v in values if v is not None] for key, values in found.items()}
    return {key: max(values) if values else None for key, values in known.items()}


def positive(text: str) -> int:
    """Parse a whole number above 0, for a command line."""
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def quantile(values: Sequence[float], share: float) -> float | None:
    """The value below which that share of the values lies, interpolated; None if there are none."""
    if not values:
        return None
    place = share * (len(values) - 1)
    ordered, low = sorted(values), math.floor(place)
    high = min(low + 1, len(values) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
