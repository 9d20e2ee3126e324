"""Races the LM head with its DPO loss against plain PyTorch, its peers and the bare products.

python -m benchmarks.head --device cpu --json head.json

Every contender's result is held against fp64 before it is timed. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import (
    TIMED,
    Contender,
    Result,
    attempt,
    clock_for,
    one_line,
    race,
    time_ratios,
    worst,
)
from benchmarks.head_cases import MODELS, Case, Inputs, case_dict, make_inputs
from benchmarks.head_contenders import ENTRIES, OURS, contender
from benchmarks.head_memory import child, memory_ratios, peaks_in_children
from benchmarks.head_truth import MULTIPLE, Judge
from benchmarks.report import print_peaks, print_times, stamps
from dpofast.summary import write_json
from dpofast_kernels import backend_for

MODULE = "benchmarks.head"
# Suffix of each pass in the names of ratios, and products of the size NHV that its work needs.
PASSES = {"forward": ("forward_time", 1), "forward_backward": ("time", 3)}
GPU_TOKENS = (4096, 8192, 16384, 32768)
TOKENS_PER_PAIR = 512  # on a GPU, on average
# On a CPU the forward pass stands beside the point: a few rounds of it tell enough.
CPU_FORWARD_ROUNDS = 3


@dataclass(eq=False)
class CaseRun:
    """What was found of one case.

    Attributes:
        ours: the contender that ratios are of.
        results: by pass, then contender.
        judge: errors of naive PyTorch, and the bounds made of them.
        targets: labels and ref_logps, for the processes that measure memory.
        memory: by contender, peaks in bytes or a reason.
        reason: why there is nothing else.
    """

    case: Case
    ours: str = ""
    results: dict[str, dict[str, Result]] = field(default_factory=dict)
    judge: dict[str, dict[str, float]] = field(default_factory=dict)
    targets: dict[str, Tensor] = field(default_factory=dict)
    memory: dict[str, dict[str, Any]] = field(default_factory=dict)
    reason: str | None = None

    @property
    def is_good(self) -> bool:
        """Whether ours was right, was timed in every pass, and its memory measured if asked for."""
        timed = all(results[self.ours].status == TIMED for results in self.results.values())
        measured = not self.memory or "reason" not in self.memory[self.ours]
        return self.reason is None and timed and measured

    def ratios(self) -> tuple[dict[str, float | None], dict[str, str]]:
        """Ours over theirs, and why some are None."""
        found: dict[str, float | None] = {}
        why: dict[str, str] = {}
        for step, results in self.results.items():
            values, reasons = time_ratios(results, self.ours, PASSES[step][0])
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
            **case_dict(self.case),
            "reason": self.reason,
            "ours": self.ours,
            "ratios": found,
            "ratio_reasons": why,
            **self.judge,
            **{
                step: {name: self._timed(step, result) for name, result in results.items()}
                for step, results in self.results.items()
            },
            "memory": self.memory,
        }

    def flop(self, step: str) -> float:
        return PASSES[step][1] * self.case.product_flop

    def _timed(self, step: str, result: Result) -> dict[str, Any]:
        """A result with its rate: operations that the work needs, not those that were done."""
        rate = self.flop(step) / result.median / 1e12 if result.median else None
        return {**result.as_dict(), "tflop_per_second": rate}


def run_case(case: Case, options: argparse.Namespace) -> CaseRun:
    """Judge everyone in every pass, then time who was right."""
    torch.compiler.reset()  # beyond a number of sizes nothing more is compiled
    inputs = make_inputs(case, options.device)
    run = CaseRun(case, options.ours or f"ours_{backend_for(inputs.hidden_states)}")
    run.targets = {"labels": inputs.labels.cpu(), "ref_logps": inputs.ref_logps.cpu()}
    judge = Judge(inputs)
    run.judge = {"naive_errors": judge.naive_errors, "error_bounds": judge.bounds}
    entered = {
        step: [_enter(name, inputs, step, run.ours, options) for name in ENTRIES]
        for step in options.passes
    }
    for step, contenders in entered.items():
        judged = getattr(judge, step)
        run.results[step] = {each.name: attempt(each, judged, options.limit) for each in contenders}
    del judge, judged  # they hold gradients in fp64
    for step, contenders in entered.items():
        short = options.device == "cpu" and step == "forward"
        rounds = min(options.rounds, CPU_FORWARD_ROUNDS) if short else options.rounds
        clock = clock_for(options.device)
        race(contenders, run.results[step], clock, rounds, options.warmup)
    return run


def _enter(
    name: str, inputs: Inputs, step: str, ours: str, options: argparse.Namespace
) -> Contender:
    """The contender, unless it is to stay out."""
    if name != ours:
        if name in options.skip or (options.contenders and name not in options.contenders):
            return Contender(name, reason="left out by the command line")
        on_cpu = ENTRIES[name].on_cpu or options.dry_run or options.contenders
        if options.device == "cpu" and not on_cpu:
            return Contender(
                name, reason=f"left out on a CPU unless asked for: --contenders {name}"
            )
    return contender(name, inputs, step)


def report(runs: list[CaseRun], options: argparse.Namespace) -> dict[str, Any]:
    """The whole JSON."""
    all_ratios = [run.ratios()[0] for run in runs]
    return {
        "benchmark": "head",
        "device": options.device,
        "dry_run": options.dry_run,
        "ours": runs[0].ours,
        # of several cases the worst; each case has its own
        "ratios": worst(all_ratios),
        "ratio_reasons": {key: why for run in runs for key, why in run.ratios()[1].items()},
        "error_rule": f"at most {MULTIPLE:g} x naive PyTorch's in the same dtype, plus a floor",
        "cases": [run.as_dict() for run in runs],
        "stamps": stamps(MODULE),
    }


def benchmark(options: argparse.Namespace) -> int:
    """Run everything; 0 if ours was right and measured, else 1."""
    torch.set_num_threads(options.threads)
    runs = []
    for case in cases_of(options):
        try:
            run = run_case(case, options)
        except torch.OutOfMemoryError as error:
            run = CaseRun(case, options.ours or "", reason=one_line(error))
        runs.append(run)
        for step, results in run.results.items():
            title = f"{case.name}: {step.replace('_', ' + ')}"
            suffix = PASSES[step][0]
            print_times(title, results, run.ratios()[0], suffix, run.flop(step))
        if run.reason:
            print(f"{case.name}: {run.reason}")
        if options.json:
            write_json(options.json, report(runs, options))
    if options.memory:
        if options.device == "cuda":
            torch.cuda.empty_cache()
        _measure_memory(runs, options)
    if options.json:
        write_json(options.json, report(runs, options))
    return 0 if all(run.is_good for run in runs) else 1


def _measure_memory(runs: list[CaseRun], options: argparse.Namespace) -> None:
    """Of everyone who was timed forward and backward."""
    runs = [run for run in runs if "forward_backward" in run.results]
    for name, entry in ENTRIES.items():
        if not entry.judged:
            continue
        racing = [run for run in runs if run.results["forward_backward"][name].status == TIMED]
        cases = [(run.case, run.targets) for run in racing]
        for run in runs:
            reason = run.results["forward_backward"][name].reason
            run.memory[name] = {"reason": reason}
        for run, peaks in zip(racing, peaks_in_children(MODULE, name, cases, options), strict=True):
            run.memory[name] = peaks
    for run in runs:
        print_peaks(f"{run.case.name}: memory", run.memory, run.ratios()[0])


def cases_of(options: argparse.Namespace) -> list[Case]:
    """What the command line asks for: on a CPU one small case, else five heads at four sizes."""
    if options.dry_run:
        return [Case("tiny", 96, 64, 1003, 3, "bfloat16", even=False)]
    is_gpu = options.device == "cuda"
    heads = {name: MODELS[name] for name in options.shapes}
    if options.hidden or options.vocab:
        hidden_size, vocab_size = next(iter(heads.values()))
        heads = {"custom": (options.hidden or hidden_size, options.vocab or vocab_size)}
    return [
        Case(
            model,
            num_tokens,
            hidden_size,
            vocab_size,
            options.pairs or (max(1, num_tokens // TOKENS_PER_PAIR) if is_gpu else 8),
            options.dtype,
            even=not is_gpu,
        )
        for model, (hidden_size, vocab_size) in heads.items()
        for num_tokens in options.tokens
    ]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; what isn't given depends on the device."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=HELP)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--json", type=Path, help="write everything to this file, too")
    add("--dry-run", action="store_true", help="a tiny bf16 case on the CPU, all contenders, fast")
    add("--shapes", nargs="+", choices=MODELS, metavar="MODEL", help=f"of {', '.join(MODELS)}")
    add(
        "--tokens",
        nargs="+",
        type=int,
        metavar="N",
        help="scored tokens; several are several cases",
    )
    add("--hidden", type=int, help="hidden size in place of the first shape's")
    add("--vocab", type=int, help="vocabulary in place of the first shape's")
    add("--pairs", type=int, help="default: 8 on a CPU, a pair per 512 tokens on a GPU")
    add("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU")
    add("--passes", nargs="+", choices=PASSES, default=list(PASSES), metavar="PASS")
    add("--contenders", nargs="+", choices=ENTRIES, default=[], metavar="NAME", help="only these")
    add("--skip", nargs="+", choices=ENTRIES, default=[], metavar="NAME", help="all but these")
    add("--ours", choices=OURS, help="whose ratios; default: that of the default backend")
    add("--rounds", type=int, help="that count; default: 7 on a CPU, 15 on a GPU")
    add("--warmup", type=int, help="rounds between the judged call and those that count")
    add("--limit", type=float, default=60.0, help="seconds for a first call, compilation included")
    add("--threads", type=int, default=2, help="of PyTorch on the CPU; default: %(default)s")
    add("--no-memory", dest="memory", action="store_false", help="start no processes for memory")
    add("--memory-of", choices=ENTRIES, help=argparse.SUPPRESS)
    add("--child-file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.dry_run:
        options.device, options.rounds = "cpu", options.rounds or 2
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    is_gpu = options.device == "cuda"
    options.shapes = options.shapes or (list(MODELS) if is_gpu else ["qwen2.5-0.5b"])
    options.tokens = options.tokens or (list(GPU_TOKENS) if is_gpu else [1024])
    options.dtype = options.dtype or ("bfloat16" if is_gpu else "float32")
    options.rounds = options.rounds or (15 if is_gpu else 7)
    if options.warmup is None:
        options.warmup = 2 if is_gpu else 0  # on a CPU the judged call is warm-up enough
    return options


HELP = """Races the LM head with its DPO loss against plain PyTorch, TRL, Liger, CCE and the bare
products. On a GPU all five heads run at four sizes, some 20 s each: pick with --shapes and
--tokens, leave out what compiles long with `--skip compile liger_dpo`, and what starts processes
with --no-memory. Exit code 1 means that ours was wrong or failed; others may."""


def main() -> None:
    options = parse()
    if options.memory_of:
        child(options)
    else:
        sys.exit(benchmark(options))


if __name__ == "__main__":
    main()
