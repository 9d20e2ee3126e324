"""Runs a race from its command line to its JSON; shared by benchmarks.train and .reference."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars

from benchmarks.data import add_data_option
from benchmarks.rounds import Contest, Counts, Race, child_runner
from benchmarks.stamps import stamps
from benchmarks.tables import print_race
from benchmarks.train_cases import SHAPES, Case, prepare
from dpofast.monitor.summary import write_json

# Takes a race, the folder of its case and a device; returns the counts of body tokens and head
# rows that our contenders must reach.
Plan = Callable[[Race, Path, str], dict[str, Counts]]


@dataclass(frozen=True)
class Program:
    """A race that can be run.

    Attributes:
        module: name for `python -m`, benchmarks.NAME.
        contest: contenders of the race.
        plan: function that gives the counts of our contenders.
        judged: what is compared with the right result, in words for the JSON.
        at_least, at_most: targets for the ratios of the race on a CPU.
    """

    module: str
    contest: Contest
    plan: Plan
    judged: str
    at_least: dict[str, float]
    at_most: dict[str, float]


def benchmark(program: Program, case: Case, title: str, options: argparse.Namespace) -> int:
    """Run a race; 0 if ours was right, was timed, and ran the planned tokens, else 1."""
    # A dry run of a GPU's race runs on the CPU.
    run_on = "cpu" if options.dry_run else options.device
    disable_progress_bars()
    with tempfile.TemporaryDirectory(prefix="dpofast-race-") as name:
        folder = Path(name)
        origin = prepare(case, folder, options.data)
        run_child = child_runner(program.contest, folder, run_on, options.threads, options.limit)
        race = Race(program.contest, case, run_child, program.contest.left_out(options))
        race.choose_batches()
        # Plan after the batch sizes are chosen, because padded micro-batches depend on them.
        planned = program.plan(race, folder, run_on)
        for number in range(options.rounds):
            race.run_round(number)
            if options.json:  # after each round: a race that is stopped keeps its rounds
                write_json(options.json, _report(program, race, planned, origin, options))
    ratios, _ = race.ratios()
    print_race(title, race.standings, ratios)
    for line in race.miscounts(planned):
        print(f"Not what was planned: {line}")
    if has_targets(options):
        _print_targets(targets(program, ratios))
    return 0 if race.is_good(planned) else 1


def has_targets(options: argparse.Namespace) -> bool:
    """Whether to check targets: only the full race on a CPU has some."""
    return options.device == "cpu" and not options.dry_run


def targets(program: Program, ratios: dict[str, float | None]) -> dict[str, dict[str, Any]]:
    """The targets and whether each holds; None if there is no ratio."""
    found: dict[str, dict[str, Any]] = {}
    for rule, bounds in (("at least", program.at_least), ("at most", program.at_most)):
        for name, bound in bounds.items():
            value, holds = ratios[name], None
            if value is not None:
                holds = value >= bound if rule == "at least" else value <= bound
            found[name] = {"value": value, "rule": rule, "bound": bound, "holds": holds}
    return found


def _print_targets(found: dict[str, dict[str, Any]]) -> None:
    words = {True: "holds", False: "is missed", None: "is unknown"}
    for name, target in found.items():
        value = "-" if target["value"] is None else f"{target['value']:.2f}"
        print(f"{name} {value}, {target['rule']} {target['bound']}: {words[target['holds']]}")


def _report(
    program: Program,
    race: Race,
    planned: dict[str, Counts],
    origin: str,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """The whole JSON."""
    ratios, why = race.ratios()
    case, contest = race.case, program.contest
    peak = "resident set of the process, imports included"
    if options.device == "cuda" and not options.dry_run:
        peak = "allocated by PyTorch while the time ran"
    truth = f"relative to {contest.truth}'s"
    return {
        "benchmark": program.module.rpartition(".")[2],
        "device": options.device,
        "dry_run": options.dry_run,
        "ours": contest.ours,
        "ratios": ratios,
        "ratio_reasons": why,
        "targets": targets(program, ratios) if has_targets(options) else None,
        "counts": {name: standing.counts for name, standing in race.standings.items()},
        "planned_counts": planned,
        "miscounts": race.miscounts(planned),
        "max_tokens_per_microbatch": case.max_tokens,
        "case": {**asdict(case), "pairs": origin, "model": SHAPES[case.shape], "peak_bytes": peak},
        "error_rule": f"of every {program.judged}, {truth}: at most {case.tolerances}",
        "contenders": {name: standing.as_dict() for name, standing in race.standings.items()},
        "stamps": stamps(program.module),
    }


def make_parser(program: Program, description: str) -> argparse.ArgumentParser:
    """A command line with the options of all races."""
    parser = argparse.ArgumentParser(prog=f"python -m {program.module}", description=description)
    add, names = parser.add_argument, program.contest.entries
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--json", type=Path, help="write everything to this file, too")
    add("--dry-run", action="store_true", help="the device's race, tiny, on the CPU")
    add("--contenders", nargs="+", choices=names, default=[], metavar="NAME", help="only these")
    add("--skip", nargs="+", choices=names, default=[], metavar="NAME", help="all but these")
    add("--rounds", type=int, help="that count; default: 3")
    add("--limit", type=float, default=900.0, help="seconds for a process of a contender")
    add("--threads", type=int, default=2, help="of PyTorch on the CPU; default: %(default)s")
    shapes = [name for name in SHAPES if name not in ("tiny", "tiny hybrid", "race")]
    add("--shape", choices=shapes, help="of the model; default on a GPU: 0.5b")
    add_data_option(parser)
    return parser


def settle(options: argparse.Namespace) -> None:
    """Fill in the defaults that depend on the device."""
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.shape = options.shape or ("0.5b" if options.device == "cuda" else "race")
    options.rounds = options.rounds or (1 if options.dry_run else 3)
