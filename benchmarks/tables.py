"""Tables of the benchmarks' figures, for the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.harness import Result


def print_times(
    title: str,
    results: dict[str, Result],
    ratios: dict[str, float | None],
    suffix: str,
    flop: float,
) -> None:
    """Print the times of one race.

    Args:
        title: title of the table.
        results: results by contender.
        ratios: ours over theirs, by "<contender>_<suffix>".
        suffix: what this race compares.
        flop: floating-point operations that the work needs.
    """
    numbers = ("ms", "p20", "p80", "TFLOP/s", "ours/theirs")
    table = _table(title, numbers, "error nearest to its bound, or why there is no time")
    for name, result in results.items():
        seconds = [result.as_dict()[key] for key in ("median", "p20", "p80")]
        rate = flop / result.median / 1e12 if result.median else None
        table.add_row(
            name,
            *[_number(None if each is None else 1e3 * each, 2) for each in seconds],
            _number(rate, 2),
            _number(ratios.get(f"{name}_{suffix}"), 3),
            f"{result.status}: {result.reason}" if result.reason else _closest(result),
        )
    console().print(table)


def print_peaks(
    title: str, memory: dict[str, dict[str, Any]], ratios: dict[str, float | None]
) -> None:
    """Print peaks of memory beyond inputs and gradients."""
    numbers = ("GB beyond inputs and gradients", "ours/theirs")
    table = _table(title, numbers, "why there is none")
    for name, peaks in memory.items():
        peak = peaks.get("beyond_inputs_and_gradients")
        table.add_row(
            name,
            _number(None if peak is None else peak / 1e9, 3),
            _number(ratios.get(f"{name}_memory"), 3),
            peaks.get("reason", ""),
        )
    console().print(table)


def print_race(title: str, standings: dict[str, Any], ratios: dict[str, float | None]) -> None:
    """Print the speeds and peaks of a race.

    Args:
        title: title of the table.
        standings: `benchmarks.rounds.Standing` by contender.
        ratios: ours over theirs, by "<contender>_speed" and "<contender>_memory".
    """
    numbers = ("pairs", "pairs/s", "ours/theirs", "peak GB", "ours/theirs")
    table = _table(title, numbers, "error nearest to its bound, or why there is no speed")
    for name, standing in standings.items():
        result = standing.result
        table.add_row(
            name,
            str(standing.batch_size or "-"),
            _number(standing.speed, 3),
            _number(ratios.get(f"{name}_speed"), 2),
            _number(None if standing.peak is None else standing.peak / 1e9, 2),
            _number(ratios.get(f"{name}_memory"), 3),
            f"{result.status}: {result.reason}" if result.reason else _closest(result),
        )
    console().print(table)


def _table(title: str, numbers: Sequence[str], remark: str) -> Table:
    """A table with a line for each contender: columns of numbers, and a last one of words."""
    table = Table(title=title, title_justify="left")
    table.add_column("contender", no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(remark, overflow="fold")
    return table


def console() -> Console:
    """A console as wide as the terminal; without a terminal, wide enough for the tables."""
    return Console(width=None if sys.stdout.isatty() else 132)


def _closest(result: Result) -> str:
    """The error that is closest to its bound, and that bound."""
    if result.verdict is None:
        return "not judged"
    errors, bounds = result.verdict.errors, result.verdict.bounds
    name = max(errors, key=lambda key: errors[key] / bounds[key])
    return f"{name} {errors[name]:.1e} / {bounds[name]:.1e}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
