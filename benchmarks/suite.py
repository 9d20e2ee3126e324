"""Runs a benchmark's cases: judges all contenders, times the right ones, then measures memory.

A benchmark provides its cases, contenders and judge, and a function that runs a case (`Benchmark`).
Command line, tables and JSON are the same for all benchmarks.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.harness import (
    TIMED,
    Contender,
    Result,
    attempt,
    clock_for,
    make_contender,
    one_line,
    positive,
    race,
    time_ratios,
    worst,
)
from benchmarks.memory import memory_ratios, peaks_in_children
from benchmarks.stamps import stamps
from benchmarks.tables import print_peaks, print_times
from dpofast.monitor.summary import write_json

# Each pass, with the suffix in the names of its ratios.
PASSES = {"forward": "forward_time", "forward_backward": "time"}
# On a CPU the forward pass gets fewer rounds: training needs both passes, so it matters less.
CPU_FORWARD_ROUNDS = 3

Step = Callable[[], Any]


@dataclass(frozen=True)
class Work:
    """Both passes of a contender, bound to their inputs.

    Attributes:
        forward: the pass without gradients.
        forward_backward: the pass with gradients.
        leaves: the contender's own inputs, which get gradients.
        holding: context of a round, see `Contender`.
    """

    forward: Step
    forward_backward: Step
    leaves: Sequence[Tensor] = ()
    holding: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass(frozen=True)
class Entry:
    """How to make a contender.

    Attributes:
        make: function that imports what the contender needs and binds it to inputs; raises if the
            contender can't run here.
        note: how its work differs from the other contenders' work.
        judged: see `Contender`.
        on_cpu: whether it takes part on a CPU without being asked for.
        gradient_error: relative error of gradients that is allowed even if the common rule allows
            less. Without it, contenders that are known to round a lot would get no time. A real
            mistake would still exceed it.
    """

    make: Callable[[Any], Work]
    note: str = ""
    judged: bool = True
    on_cpu: bool = True
    gradient_error: float = 0.0


class Case(Protocol):
    """One size of the work."""

    @property
    def name(self) -> str:
        """Name of the case in tables and JSON."""
        ...

    def flop(self, step: str) -> float:
        """Floating-point operations that a pass needs, whatever a contender really does."""
        ...

    def as_dict(self) -> dict[str, Any]:
        """The case as it is written to JSON."""
        ...


@dataclass(eq=False)
class CaseRun:
    """The results of one case.

    Attributes:
        case: the case that ran.
        ours: the contender that the others are compared with.
        payload: data from which a process that measures memory makes the inputs.
        results: results by pass, then by contender.
        judge: errors of naive PyTorch, and the bounds that follow from them.
        memory: for each contender its peaks in bytes, or the reason why there are none.
        extra: figures that only this benchmark has.
        reason: why the case could not run.
    """

    case: Case
    ours: str = ""
    payload: Any = None
    results: dict[str, dict[str, Result]] = field(default_factory=dict)
    judge: dict[str, dict[str, float]] = field(default_factory=dict)
    memory: dict[str, dict[str, Any]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None

    @property
    def is_good(self) -> bool:
        """Whether ours was right and timed in every pass, and its memory measured if asked for."""
        timed = all(results[self.ours].status == TIMED for results in self.results.values())
        measured = not self.memory or "reason" not in self.memory[self.ours]
        return self.reason is None and timed and measured

    def ratios(self) -> tuple[dict[str, float | None], dict[str, str]]:
        """Ours over theirs for times and memory, and why some are None."""
        found: dict[str, float | None] = {}
        why: dict[str, str] = {}
        for step, results in self.results.items():
            values, reasons = time_ratios(results, self.ours, PASSES[step])
            found.update(values)
            why.update(reasons)
        if self.memory:
            values, reasons = memory_ratios(self.memory, self.ours)
            found.update(values)
            why.update(reasons)
        return found, why

    def as_dict(self) -> dict[str, Any]:
        found, why = self.ratios()
        return {
            **self.case.as_dict(),
            "reason": self.reason,
            "ours": self.ours,
            "ratios": found,
            "ratio_reasons": why,
            **self.judge,
            **self.extra,
            **{
                step: {name: self._timed(step, result) for name, result in results.items()}
                for step, results in self.results.items()
            },
            "memory": self.memory,
        }

    def _timed(self, step: str, result: Result) -> dict[str, Any]:
        """A result with its rate, which counts the operations needed, not those that were done."""
        rate = self.case.flop(step) / result.median / 1e12 if result.median else None
        return {**result.as_dict(), "tflop_per_second": rate}


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: name in the JSON.
        module: name for `python -m`, also in the processes that measure memory.
        entries: the contenders by name.
        run_case: function that runs a case, memory excepted.
        peaks: function from a contender's name, a case's payload and a device to peaks in bytes.
        error_rule: the judge's rule, in words.
    """

    name: str
    module: str
    entries: Mapping[str, Entry]
    run_case: Callable[[Any, argparse.Namespace], CaseRun]
    peaks: Callable[[str, Any, str], dict[str, Any]]
    error_rule: str

    def run(self, cases: Sequence[Case], options: argparse.Namespace) -> int:
        """Run all cases, then measure memory; 0 if ours was right and measured, else 1."""
        torch.set_num_threads(options.threads)
        runs = []
        for case in cases:
            try:
                run = self.run_case(case, options)
            except torch.OutOfMemoryError as error:
                run = CaseRun(case, options.ours or "", reason=one_line(error))
            runs.append(run)
            for step, results in run.results.items():
                title = f"{case.name}: {step.replace('_', ' + ')}"
                print_times(title, results, run.ratios()[0], PASSES[step], case.flop(step))
            if run.reason:
                print(f"{case.name}: {run.reason}")
            self._write(runs, options)
        if options.memory:
            if options.device == "cuda":
                # The children need the memory that this process' allocator keeps.
                torch.cuda.empty_cache()
            self._measure_memory(runs, options)
            self._write(runs, options)
        return 0 if all(run.is_good for run in runs) else 1

    def child(self, options: argparse.Namespace) -> None:
        """Measure memory in a process of `peaks_in_children`; print a line of JSON per case."""
        torch.set_num_threads(options.threads)
        for payload in torch.load(options.child_file, weights_only=False):
            torch.compiler.reset()  # torch.compile gives up on a function after 8 sizes
            try:
                peaks = self.peaks(options.memory_of, payload, options.device)
            except Exception as error:  # a peer can raise anything, and the next case can work
                peaks = {"reason": one_line(error)}
            print(json.dumps(peaks), flush=True)
            gc.collect()

    def report(self, runs: list[CaseRun], options: argparse.Namespace) -> dict[str, Any]:
        """The whole JSON."""
        all_ratios = [run.ratios()[0] for run in runs]
        return {
            "benchmark": self.name,
            "device": options.device,
            "dry_run": options.dry_run,
            "ours": runs[0].ours,
            # The worst of all cases; each case has its own, too.
            "ratios": worst(all_ratios),
            "ratio_reasons": {key: why for run in runs for key, why in run.ratios()[1].items()},
            "error_rule": self.error_rule,
            "cases": [run.as_dict() for run in runs],
            "stamps": stamps(self.module),
        }

    def _write(self, runs: list[CaseRun], options: argparse.Namespace) -> None:
        if options.json:
            write_json(options.json, self.report(runs, options))

    def _measure_memory(self, runs: list[CaseRun], options: argparse.Namespace) -> None:
        """Measure the contenders that were timed forward and backward."""
        step = "forward_backward"
        runs = [run for run in runs if step in run.results]
        for name, entry in self.entries.items():
            if not entry.judged:
                continue
            racing = [run for run in runs if run.results[step][name].status == TIMED]
            for run in runs:
                # Only contenders that were timed are measured; the others keep their reason.
                run.memory[name] = {"reason": run.results[step][name].reason}
            payloads = [run.payload for run in racing]
            found = peaks_in_children(self.module, name, payloads, options)
            for run, peaks in zip(racing, found, strict=True):
                run.memory[name] = peaks
        for run in runs:
            print_peaks(f"{run.case.name}: memory", run.memory, run.ratios()[0])


def judge_all(
    run: CaseRun, entries: Mapping[str, Entry], inputs: Any, judge: Any, options: argparse.Namespace
) -> dict[str, list[Contender]]:
    """Make the contenders of every pass; judge each with the judge's method named like the pass."""
    entered = {
        step: [_enter(name, entries[name], inputs, step, run.ours, options) for name in entries]
        for step in options.passes
    }
    for step, contenders in entered.items():
        results = run.results[step] = {}
        for each in contenders:
            judged, allowed = getattr(judge, step), entries[each.name].gradient_error
            if allowed:
                judged = partial(judged, gradient_error=allowed)
            results[each.name] = attempt(each, judged, options.limit)
    return entered


def time_all(
    run: CaseRun, entered: dict[str, list[Contender]], options: argparse.Namespace
) -> None:
    """Time the contenders that were right, in interleaved rounds."""
    for step, contenders in entered.items():
        short = options.device == "cpu" and step == "forward"
        rounds = min(options.rounds, CPU_FORWARD_ROUNDS) if short else options.rounds
        race(contenders, run.results[step], clock_for(options.device), rounds, options.warmup)


def contender(name: str, entry: Entry, inputs: Any, step: str) -> Contender:
    """Bind a contender to its inputs; `step` is "forward" or "forward_backward"."""

    def make() -> Contender:
        work = entry.make(inputs)
        run: Step = getattr(work, step)
        return Contender(name, run, note=entry.note, judged=entry.judged, holding=work.holding)

    return make_contender(name, make, entry.note)


def _enter(
    name: str, entry: Entry, inputs: Any, step: str, ours: str, options: argparse.Namespace
) -> Contender:
    """Make the contender; if it is left out, make one that has only the reason."""
    if name != ours:
        if name in options.skip or (options.contenders and name not in options.contenders):
            return Contender(name, reason="left out by the command line")
        on_cpu = entry.on_cpu or options.dry_run or options.contenders
        if options.device == "cpu" and not on_cpu:
            return Contender(
                name, reason=f"left out on a CPU unless asked for: --contenders {name}"
            )
    return contender(name, entry, inputs, step)


def add_options(
    parser: argparse.ArgumentParser, entries: Mapping[str, Entry], ours: Sequence[str]
) -> None:
    """Add the options that all benchmarks have."""
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--json", type=Path, help="write everything to this file, too")
    add("--dry-run", action="store_true", help="tiny bf16 cases on the CPU, all contenders, fast")
    add("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU")
    add("--passes", nargs="+", choices=PASSES, default=list(PASSES), metavar="PASS")
    add("--contenders", nargs="+", choices=entries, default=[], metavar="NAME", help="only these")
    add("--skip", nargs="+", choices=entries, default=[], metavar="NAME", help="all but these")
    add("--ours", choices=ours, help="whose ratios; default: that of the default backend")
    add("--rounds", type=positive, help="that count; default: 7 on a CPU, 15 on a GPU")
    add("--warmup", type=int, help="rounds between the judged call and those that count")
    add("--limit", type=float, default=60.0, help="seconds for a first call, compilation included")
    add("--threads", type=positive, default=2, help="of PyTorch on the CPU; default: %(default)s")
    add("--no-memory", dest="memory", action="store_false", help="start no processes for memory")
    add("--memory-of", choices=entries, help=argparse.SUPPRESS)
    add("--child-file", type=Path, help=argparse.SUPPRESS)


def settle(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line and fill in defaults for the device; a dry run uses the CPU."""
    options = parser.parse_args(arguments)
    if options.dry_run:
        options.device, options.rounds = "cpu", options.rounds or 2
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    is_gpu = options.device == "cuda"
    if is_gpu and not torch.cuda.is_available():
        parser.error("argument --device: there is no CUDA or ROCm device; take cpu, or --dry-run")
    options.dtype = options.dtype or ("bfloat16" if is_gpu or options.dry_run else "float32")
    options.rounds = options.rounds or (15 if is_gpu else 7)
    if options.warmup is None:
        options.warmup = 2 if is_gpu else 0  # on a CPU the judged call has warmed up
    return options
