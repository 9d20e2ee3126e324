"""Peak memory of contenders, each measured in a process of its own.

A benchmark starts itself again with hidden arguments. The child prints one line of JSON per case.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import REPOSITORY
from benchmarks.harness import ratios

# Written to /proc/self/clear_refs, this resets the peak VmHWM to the resident size (proc(5)).
CLEAR_PEAK = "5"
CHILD_SECONDS = 600.0
CASE_SECONDS = 120.0  # more for each case after the first


def peak_beyond_baseline(run: Callable[[], Any], device: str) -> int:
    """Peak memory of a call, in bytes beyond what was allocated before.

    Make inputs and imports before this. The call runs twice and the second run is measured. That
    counts buffers that stay allocated, and leaves out what is needed only once, like compilation
    and tuning.
    On a CPU whose peak can't be reset, the first run is measured.

    Args:
        run: one round of a contender; the memory of its result counts while `run` refers to it.
        device: "cpu" or "cuda".
    """
    gc.collect()
    if device == "cuda":
        baseline = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - baseline
    baseline = _resident_bytes()
    if _can_reset_peak():
        run()
        gc.collect()
        _reset_peak()
        run()
        return _status_bytes("VmHWM") - baseline
    run()
    return process_peak_bytes() - baseline


def measure_in_child(
    module: str, arguments: Sequence[str], timeout_seconds: float
) -> tuple[list[dict[str, Any]], str | None]:
    """Run `python -m module arguments` and read what it prints.

    Returns:
        The JSON objects that it printed, one per line, and the reason if it failed, else None.
    """
    paths = [str(REPOSITORY), str(REPOSITORY / "kernels"), *filter(None, sys.path)]
    try:
        child = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            timeout=timeout_seconds,
            text=True,
            check=False,
        )
    except subprocess.TimeoutExpired as expired:
        printed = (expired.stdout or b"").decode()  # bytes here, in spite of text=True
        return _objects(printed), f"took longer than {timeout_seconds:g} s"
    objects = _objects(child.stdout)
    if child.returncode == 0:
        return objects, None
    # A signal ended it: SIGKILL if the system ran out of memory.
    if child.returncode < 0:
        return objects, f"ended by {signal.Signals(-child.returncode).name}"
    lines = child.stderr.strip().splitlines()
    return objects, f"exit code {child.returncode}: {lines[-1] if lines else 'nothing said'}"


def _objects(printed: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]


def peaks_in_children(
    module: str, name: str, payloads: Sequence[Any], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Measure the peaks of one contender in every case.

    On a GPU one process runs all cases, because the allocator's peak can be reset. On a CPU each
    case gets a process of its own, except in a dry run: memory that the C library keeps from one
    case would count in the next.

    Args:
        module: module of the benchmark, which has the hidden options --memory-of and --child-file.
        name: name of the contender.
        payloads: data of each case, from which the process makes its inputs; pickled.
        options: command line; device and threads are passed on.
    Returns:
        For each case its peaks in bytes, or {"reason": why there are none}.
    """
    if options.device == "cuda" or options.dry_run:
        return _peaks_in_child(module, name, payloads, options)
    return [peaks for each in payloads for peaks in _peaks_in_child(module, name, [each], options)]


def memory_ratios(
    memory: dict[str, dict[str, Any]], ours: str
) -> tuple[dict[str, float | None], dict[str, str]]:
    """Our peak over each contender's, beyond inputs and gradients; why some ratios are None."""
    peaks = {name: each.get("beyond_inputs_and_gradients") for name, each in memory.items()}
    # Noise can make a small peak negative, and then a ratio means nothing.
    values = {name: peak if peak is not None and peak > 0 else None for name, peak in peaks.items()}
    reasons = {name: each.get("reason") for name, each in memory.items()}
    return ratios(values, reasons, ours, "memory")


def _peaks_in_child(
    module: str, name: str, payloads: Sequence[Any], options: argparse.Namespace
) -> list[dict[str, Any]]:
    if not payloads:
        return []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cases.pt"
        torch.save(list(payloads), file)
        arguments = ["--device", options.device, "--threads", str(options.threads)]
        arguments += ["--memory-of", name, "--child-file", str(file)]
        seconds = CHILD_SECONDS + CASE_SECONDS * (len(payloads) - 1)
        found, reason = measure_in_child(module, arguments, seconds)
    # A child that died has reported fewer cases than it got.
    missing = {"reason": reason or "its process said nothing"}
    return [*found, *[missing] * (len(payloads) - len(found))]


def process_peak_bytes() -> int:
    """The largest resident set of this process until now, imports included.

    Read from /proc if there is one: `ru_maxrss` starts with the parent's size at the fork.
    """
    if _has_status():
        return _status_bytes("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _can_reset_peak() -> bool:
    return os.access("/proc/self/clear_refs", os.W_OK)


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text(CLEAR_PEAK, encoding="ascii")


def _resident_bytes() -> int:
    """The resident set now; without /proc, the peak until now."""
    return _status_bytes("VmRSS") if _has_status() else process_peak_bytes()


def _has_status() -> bool:
    return Path("/proc/self/status").exists()


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")
