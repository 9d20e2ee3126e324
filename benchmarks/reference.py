"""Races the building of reference log-probs: our builder, TRL's precompute, and plain PyTorch.

python -m benchmarks.reference --device cpu --json reference.json

Every contender's log-probs are held against plain PyTorch's before it gets a speed. See
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars

from benchmarks.data import add_data_option
from benchmarks.reference_cases import ReferenceCase, ReferenceWork, gpu_case, race_case, tiny
from benchmarks.reference_child import MODULE as CHILD_MODULE
from benchmarks.reference_contenders import ENTRIES, OURS, TRUTH
from benchmarks.report import print_race, stamps
from benchmarks.rounds import (
    Contest,
    Counts,
    Race,
    child_runner,
    memory_words,
    print_targets,
    targets,
)
from benchmarks.train_cases import SHAPES, Work, prepare
from dpofast.data.layout import Layout
from dpofast.reference.batches import BatchesOfTokens
from dpofast.reference.pairs import read_answers
from dpofast.summary import write_json

MODULE = "benchmarks.reference"
CONTEST = Contest(ENTRIES, OURS, TRUTH, CHILD_MODULE)
# What the race on a CPU is to show, of `ratios`.
AT_LEAST = {"trl_speed": 1.5}
AT_MOST = {"trl_memory": 1.0}


def benchmark(options: argparse.Namespace) -> int:
    """Run everything; 0 if ours was right, timed, and ran what the plan says, else 1."""
    case = case_of(options)
    run_on = "cpu" if options.dry_run else options.device
    disable_progress_bars()
    with tempfile.TemporaryDirectory(prefix="dpofast-race-") as name:
        folder = Path(name)
        origin = prepare(case, folder, options.data)
        run_child = child_runner(CONTEST, folder, run_on, options.threads, options.limit)
        race = Race(CONTEST, case, run_child, CONTEST.left_out(options))
        race.choose_batches()
        planned = {OURS: planned_counts(ReferenceWork(folder, run_on, 1, case.steps))}
        for number in range(options.rounds):
            race.run_round(number)
            if options.json:
                write_json(options.json, report(race, planned, origin, options))
    print_report(race, planned, options)
    return 0 if race.is_good(planned) else 1


def planned_counts(work: Work) -> Counts:
    """Body tokens and head rows of our builder."""
    answers = read_answers(work.timed_pairs)
    num_tokens = partial(Layout("shared").num_tokens, by_prompt=True)
    batches = BatchesOfTokens(work.case.max_tokens, num_tokens)(answers, answers.first)
    scored = sum(len(answers.ids(answer)[1]) for answer in answers.first.tolist())
    return {"body_tokens": sum(batch.num_tokens for batch in batches), "head_rows": scored}


def report(
    race: Race, planned: dict[str, Counts], origin: str, options: argparse.Namespace
) -> dict[str, Any]:
    """The whole JSON."""
    ratios, why = race.ratios()
    case = race.case
    peak = memory_words(options.device == "cuda" and not options.dry_run)
    return {
        "benchmark": "reference",
        "device": options.device,
        "dry_run": options.dry_run,
        "ours": OURS,
        "ratios": ratios,
        "ratio_reasons": why,
        "targets": targets(ratios, AT_LEAST, AT_MOST) if has_targets(options) else None,
        "counts": {name: standing.counts for name, standing in race.standings.items()},
        "planned_counts": planned,
        "miscounts": race.miscounts(planned),
        "max_tokens_per_microbatch": case.max_tokens,
        "case": {**asdict(case), "pairs": origin, "model": SHAPES[case.shape], "peak_bytes": peak},
        "error_rule": f"of every answer, relative to {TRUTH}'s: at most {case.tolerances}",
        "contenders": {name: standing.as_dict() for name, standing in race.standings.items()},
        "stamps": stamps(MODULE),
    }


def has_targets(options: argparse.Namespace) -> bool:
    return options.device == "cpu" and not options.dry_run


def print_report(race: Race, planned: dict[str, Counts], options: argparse.Namespace) -> None:
    ratios, _ = race.ratios()
    case = race.case
    title = (
        f"{case.shape}: reference log-probs of {case.pairs_per_step} pairs, {case.dtype}, "
        f"max_tokens_per_microbatch {case.max_tokens}"
    )
    print_race(title, race.standings, ratios)
    for line in race.miscounts(planned):
        print(f"Not what was planned: {line}")
    if has_targets(options):
        print_targets(targets(ratios, AT_LEAST, AT_MOST))


def case_of(options: argparse.Namespace) -> ReferenceCase:
    """What the command line asks for."""
    case = gpu_case(options.shape) if options.device == "cuda" else race_case()
    return tiny(case) if options.dry_run else case


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; what isn't given depends on the device."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=HELP)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--json", type=Path, help="write everything to this file, too")
    add("--dry-run", action="store_true", help="the device's race, tiny, on the CPU")
    add("--contenders", nargs="+", choices=ENTRIES, default=[], metavar="NAME", help="only these")
    add("--skip", nargs="+", choices=ENTRIES, default=[], metavar="NAME", help="all but these")
    add("--rounds", type=int, help="that count; default: 3")
    add("--limit", type=float, default=900.0, help="seconds for a process of a contender")
    add("--threads", type=int, default=2, help="of PyTorch on the CPU; default: %(default)s")
    shapes = [name for name in SHAPES if name not in ("tiny", "race")]
    add("--shape", choices=shapes, default="0.5b", help="on a GPU; default: %(default)s")
    add_data_option(parser)
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.rounds = options.rounds or (1 if options.dry_run else 3)
    return options


HELP = """Races our builder of reference log-probs, TRL's precompute and plain PyTorch, each in
processes of its own. On a CPU it is one race of some 10 minutes on two cores. On a GPU choose the
model with --shape. Exit code 1 means that ours was wrong, failed, or ran other tokens than planned;
others may."""


def main() -> None:
    sys.exit(benchmark(parse()))


if __name__ == "__main__":
    main()
