"""Races the attention back ends on packed rows of real lengths, forward and backward.

python -m benchmarks.attention --device cpu --json attention.json

Every contender's result is compared with the naive twin in fp64 before it is timed. See
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from benchmarks.attention_cases import (
    DATA,
    KINDS,
    MODELS,
    Case,
    fill_row,
    make_inputs,
    pair_groups,
)
from benchmarks.attention_contenders import ENTRIES, OURS
from benchmarks.attention_truth import MULTIPLE, Judge
from benchmarks.harness import one_line
from benchmarks.memory import peak_beyond_baseline
from benchmarks.suite import Benchmark, CaseRun, add_options, judge_all, settle, time_all
from dpofast_kernels.attention import backend_for

MODULE = "benchmarks.attention"
# Default numbers of tokens in a row. "Side" rows have pairs of a data set after the first, or
# use a window, a softcap or sinks.
GPU_TOKENS = (2048, 4096, 8192, 16384, 32768)
GPU_SIDE_TOKENS = 8192
CPU_TOKENS = 2048
CPU_SIDE_TOKENS = 512
DRY_TOKENS = 128


def run_case(case: Case, options: argparse.Namespace) -> CaseRun:
    """Judge all contenders in every pass, then time those that were right."""
    inputs = make_inputs(case, options.device)
    backend = backend_for(inputs.query, inputs.value, inputs.options)
    run = CaseRun(case, options.ours or f"ours_{backend}", payload=case)
    judge = Judge(inputs)
    run.judge = {"naive_errors": judge.naive_errors, "error_bounds": judge.bounds}
    entered = judge_all(run, ENTRIES, inputs, judge, options)
    del judge  # frees its gradients in fp64 before the race
    time_all(run, entered, options)
    run.extra = {"gather_costs": {step: _gather_costs(run, step) for step in run.results}}
    return run


def _gather_costs(run: CaseRun, step: str) -> float | None:
    """Time of varlen attention with its gather, over the time without it."""
    whole, alone = (run.results[step][name].median for name in ("ours_varlen", "varlen_alone"))
    return whole / alone if whole and alone else None


def peaks(name: str, payload: Any, device: str) -> dict[str, Any]:
    """One contender's peak memory in bytes: beyond its inputs, and beyond inputs and gradients.

    Inputs and gradients are the contender's own. They are larger if it holds tokens twice.
    """
    try:
        work = ENTRIES[name].make(make_inputs(payload, device))
    except Exception as error:  # a contender may raise anything; the reason is reported
        return {"reason": one_line(error)}
    gradients = sum(leaf.nbytes for leaf in work.leaves)
    peak = peak_beyond_baseline(work.forward_backward, device)
    return {
        "beyond_inputs": peak,
        "beyond_inputs_and_gradients": peak - gradients,
        "gradients": gradients,
    }


BENCHMARK = Benchmark(
    name="attention",
    module=MODULE,
    entries=ENTRIES,
    run_case=run_case,
    peaks=peaks,
    error_rule=f"in the worst pair at most {MULTIPLE:g} x plain PyTorch's in the same dtype, "
    "plus a floor",
)


def benchmark(options: argparse.Namespace) -> int:
    """Run the command line's cases and return the exit code, see `Benchmark.run`."""
    return BENCHMARK.run(cases_of(options), options)


def cases_of(options: argparse.Namespace) -> list[Case]:
    """The cases that the command line asks for.

    The first data set runs at all lengths, the others run at one. The last model also runs the
    other kinds of attention.
    """
    data, *other_data = options.data
    rows = [(data, tokens) for tokens in options.tokens]
    rows += [(other, options.side_tokens) for other in other_data]
    cases = [Case(model, *row, "plain", options.dtype) for model in options.models for row in rows]
    sides = [kind for kind in options.kinds if kind != "plain"]
    return (cases if "plain" in options.kinds else []) + [
        Case(options.models[-1], data, options.side_tokens, kind, options.dtype) for kind in sides
    ]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; defaults depend on the device."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=HELP)
    add_options(parser, ENTRIES, OURS)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, metavar="MODEL", help=f"of {', '.join(MODELS)}")
    add("--data", nargs="+", choices=DATA, metavar="DATA", help=f"of {', '.join(DATA)}")
    add("--tokens", nargs="+", type=int, metavar="T", help="of a row; several are several cases")
    add("--kinds", nargs="+", choices=KINDS, metavar="KIND", help=f"of {', '.join(KINDS)}")
    add("--side-tokens", type=int, metavar="T", help="of rows of further data and of other kinds")
    options = settle(parser, arguments)
    is_small = options.device == "cpu" and not options.dry_run
    tokens, side_tokens = list(GPU_TOKENS), GPU_SIDE_TOKENS
    if options.dry_run:
        tokens, side_tokens = [DRY_TOKENS], DRY_TOKENS
    elif is_small:
        tokens, side_tokens = [CPU_TOKENS], CPU_SIDE_TOKENS
    options.models = options.models or list(MODELS)[: 1 if is_small else None]
    options.data = options.data or list(DATA)
    options.kinds = options.kinds or list(KINDS)
    options.tokens = options.tokens or tokens
    options.side_tokens = options.side_tokens or side_tokens
    try:
        for case in cases_of(options):
            fill_row(pair_groups(case.data), case.max_tokens)
    except ValueError as error:
        parser.error(str(error))
    return options


HELP = """Races the back ends of attention over packed rows: ours on a row that holds the prefix of
a pair once, the same with each sequence separate, and padded SDPA. Lengths are those of real pairs.
On a GPU 21 rows run: pick with --models, --tokens and --kinds, leave out what compiles long with
`--skip ours_flex`, and what starts processes with --no-memory. Exit code 1 means that ours was
wrong or failed; others may."""


def main() -> None:
    options = parse()
    if options.memory_of:
        BENCHMARK.child(options)
    else:
        sys.exit(benchmark(options))


if __name__ == "__main__":
    main()
