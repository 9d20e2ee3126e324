"""What every benchmark says beside its figures, and how it prints them."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import REPOSITORY
from benchmarks.harness import Result
from dpofast.summary import hardware, versions

PEERS = ("trl", "liger-kernel", "cut-cross-entropy")


def stamps(module: str) -> dict[str, Any]:
    """When, where, with which versions and by which command line a benchmark ran."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "git": git_state(REPOSITORY),
        "hardware": {**hardware(), "cpu": _cpu_name(), "cpu_count": os.cpu_count(), **_gpu()},
        "versions": {**versions(), **{name: _version(name) for name in PEERS}},
    }


def git_state(folder: Path) -> dict[str, Any]:
    """The commit that is checked out, and whether anything differs from it; None if unknown."""
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain")
    return {"commit": commit or None, "dirty": None if changes is None else bool(changes)}


def print_times(
    title: str,
    results: dict[str, Result],
    ratios: dict[str, float | None],
    suffix: str,
    flop: float,
) -> None:
    """A table of one race.

    Args:
        title: of the table.
        results: by contender.
        ratios: by "<contender>_<suffix>", ours over theirs.
        suffix: of this race in the names of ratios.
        flop: floating-point operations that the work needs.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("contender", no_wrap=True)
    for name in ("ms", "p20", "p80", "TFLOP/s", "ours/theirs"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("error nearest to its bound, or why there is no time", overflow="fold")
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
    _console().print(table)


def print_peaks(
    title: str, memory: dict[str, dict[str, Any]], ratios: dict[str, float | None]
) -> None:
    """A table of peaks beyond inputs and gradients."""
    table = Table(title=title, title_justify="left")
    table.add_column("contender", no_wrap=True)
    table.add_column("GB beyond inputs and gradients", justify="right")
    table.add_column("ours/theirs", justify="right")
    table.add_column("why there is none", overflow="fold")
    for name, peaks in memory.items():
        peak = peaks.get("beyond_inputs_and_gradients")
        table.add_row(
            name,
            _number(None if peak is None else peak / 1e9, 3),
            _number(ratios.get(f"{name}_memory"), 3),
            peaks.get("reason", ""),
        )
    _console().print(table)


def print_race(title: str, standings: dict[str, Any], ratios: dict[str, float | None]) -> None:
    """A table of a race of whole steps.

    Args:
        title: of the table.
        standings: by contender, as `benchmarks.rounds.Standing`.
        ratios: by "<contender>_speed" and "<contender>_memory", ours over theirs.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("contender", no_wrap=True)
    for name in ("pairs", "pairs/s", "ours/theirs", "peak GB", "ours/theirs"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("error nearest to its bound, or why there is no speed", overflow="fold")
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
    _console().print(table)


def _console() -> Console:
    """As wide as the terminal; wide enough for the tables where there is none."""
    return Console(width=None if sys.stdout.isatty() else 132)


def _closest(result: Result) -> str:
    """The error that comes closest to its bound."""
    if result.verdict is None:
        return "not judged"
    errors, bounds = result.verdict.errors, result.verdict.bounds
    name = max(errors, key=lambda key: errors[key] / bounds[key])
    return f"{name} {errors[name]:.1e} / {bounds[name]:.1e}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpu() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties()
    return {
        "gpu_memory_bytes": properties.total_memory,
        "compute_capability": [properties.major, properties.minor],
        "cuda": torch.version.cuda or torch.version.hip,
    }


def _cpu_name() -> str | None:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return None
