"""Races between contenders that do the same work: judged first, then timed in interleaved rounds.

A contender whose result is wrong gets no speed, one that can't run is reported with its reason, and
neither ends the benchmark. Memory is in benchmarks/memory.py, tables are in benchmarks/tables.py.
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
# Larger than any L2 cache; zeroing it also lets the host run ahead of the device.
FLUSH_BYTES = 2**28

Clock = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True, eq=False)
class Contender:
    """Something that does the work, or the reason why it can't.

    Attributes:
        name: as it stands in the JSON and in the names of ratios.
        run: one round; what it returns is judged. None where it can't run.
        reason: why it can't run.
        note: what work it does where that isn't just the work asked for.
        judged: False for a floor, which has no result.
        holding: entered around each round, outside its time: memory that a round finds ready, and
            that must not lack while others run.
    """

    name: str
    run: Callable[[], Any] | None = None
    reason: str | None = None
    note: str = ""
    judged: bool = True
    holding: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass(frozen=True)
class Verdict:
    """Errors of one result, and how large each may be; under the same names."""

    errors: dict[str, float]
    bounds: dict[str, float]

    @property
    def complaint(self) -> str | None:
        """Which errors exceed their bounds, or None if the result is right. NaN exceeds any."""
        beyond = [
            f"{name} {error:.2e}, at most {self.bounds[name]:.2e}"
            for name, error in self.errors.items()
            if not error <= self.bounds[name]
        ]
        return f"error of {'; '.join(beyond)}" if beyond else None


@dataclass(eq=False)
class Result:
    """What became of one contender.

    Attributes:
        status: "timed", "wrong", "failed" or "absent".
        reason: why it isn't timed.
        verdict: None where nothing was judged.
        seconds: of each counted round; empty unless timed.
    """

    name: str
    note: str
    status: str = TIMED
    reason: str | None = None
    verdict: Verdict | None = None
    seconds: list[float] = field(default_factory=list)

    def drop(self, status: str, reason: str) -> None:
        """Take it out of the race; what it was timed at is forgotten."""
        self.status, self.reason = status, reason
        self.seconds.clear()

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON; seconds throughout."""
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
    """A contender can't run here; the message says why, and stands as its reason."""


class TimeLimitError(Exception):
    """A contender took longer than it may."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeLimitError after so long; an operation under way is ended first. Main thread."""

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
    """Seconds of one call, on a CPU."""
    started = time.perf_counter()
    result = run()
    elapsed = time.perf_counter() - started
    del result  # freed outside the time
    return elapsed


class CudaClock:
    """Seconds of one call on the current CUDA device, between two events, from a cold L2 cache."""

    def __init__(self) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def __call__(self, run: Callable[[], Any]) -> float:
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._flush.zero_()
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
    """Class and first line of an error; of an AbsentError the line alone."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    line = lines[0].strip()
    return line if isinstance(error, AbsentError) else f"{type(error).__name__}: {line}"


def make_contender(name: str, make: Callable[[], Contender], note: str = "") -> Contender:
    """A contender from what imports it and sets it up; if that fails, one that can't run."""
    try:
        return make()
    except Exception as error:  # a peer's import may raise anything
        return Contender(name, reason=one_line(error), note=note)


def attempt(
    contender: Contender,
    judge: Callable[[Any], Verdict],
    limit_seconds: float,
) -> Result:
    """Run a contender once and judge what it gives; compilation falls in here, too."""
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
    except Exception as error:  # a peer may raise anything, and the race goes on
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
    """Time everyone whose attempt was right, in rounds that each start with another one.

    Args:
        contenders: all of them.
        attempts: by name, what `attempt` gave; seconds and failures are written to it.
        clock: that times one call.
        rounds: that count.
        warmup: rounds before, which don't.
    """
    for number in range(-warmup, rounds):
        running = [each for each in contenders if attempts[each.name].status == TIMED]
        for contender in rotated(running, number):
            assert contender.run is not None
            result = attempts[contender.name]
            try:
                with contender.holding():
                    elapsed = clock(contender.run)
            except Exception as error:  # likewise
                result.drop(FAILED, one_line(error))
            else:
                if number >= 0:
                    result.seconds.append(elapsed)
            if result.status == FAILED:
                _free_memory()


def rotated(items: Sequence[Any], number: int) -> list[Any]:
    """The items in their order, from another one on with every number."""
    start = number % len(items) if items else 0
    return [*items[start:], *items[:start]]


def ratios(
    values: dict[str, float | None], reasons: dict[str, str | None], ours: str, suffix: str
) -> tuple[dict[str, float | None], dict[str, str]]:
    """Ours over theirs for every other contender, as "<name>_<suffix>".

    Args:
        values: by contender; None where there is nothing to compare.
        reasons: by contender, why there isn't.
        ours: the name of ours.
        suffix: what is compared.

    Returns:
        The ratios, None where one of the two has no value, and the reasons for those.
    """
    found: dict[str, float | None] = {}
    why: dict[str, str] = {}
    for name, theirs in values.items():
        if name == ours:
            continue
        key, mine = f"{name}_{suffix}", values[ours]
        found[key] = mine / theirs if mine is not None and theirs else None
        if found[key] is None:
            lacking = ours if mine is None else name
            why[key] = f"{lacking}: {reasons.get(lacking) or 'measured nothing above zero'}"
    return found, why


def time_ratios(
    results: dict[str, Result], ours: str, suffix: str
) -> tuple[dict[str, float | None], dict[str, str]]:
    """`ratios` of median times."""
    medians = {name: result.median for name, result in results.items()}
    return ratios(medians, {name: r.reason for name, r in results.items()}, ours, suffix)


def worst(all_ratios: Sequence[dict[str, float | None]]) -> dict[str, float | None]:
    """Of every ratio the largest over several cases; None where no case has it."""
    keys = dict.fromkeys(key for each in all_ratios for key in each)
    found = {key: [each.get(key) for each in all_ratios] for key in keys}
    known = {key: [v for v in values if v is not None] for key, values in found.items()}
    return {key: max(values) if values else None for key, values in known.items()}


def positive(text: str) -> int:
    """A whole number above 0, for a command line."""
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def quantile(values: Sequence[float], share: float) -> float | None:
    """The value below which that share lies, interpolated; None of nothing."""
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
