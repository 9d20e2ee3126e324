"""Races whole DPO training steps: our layouts, TRL, and plain PyTorch as a textbook writes it.

python -m benchmarks.train --device cpu --json train.json

Every contender's losses are held against plain PyTorch's before it gets a speed. See
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars

from benchmarks.data import add_data_option
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
from benchmarks.train_cases import SHAPES, Case, Work, gpu_case, prepare, race_case, tiny
from benchmarks.train_child import MODULE as CHILD_MODULE
from benchmarks.train_contenders import ENTRIES, OURS, TRUTH
from dpofast.data.layout import Layout
from dpofast.data.loader import token_limit
from dpofast.data.plan import BatchShape, StepSampler
from dpofast.summary import write_json

MODULE = "benchmarks.train"
CONTEST = Contest(ENTRIES, OURS, TRUTH, CHILD_MODULE)
# What the race on a CPU is to show, of `ratios`.
AT_LEAST = {"padded_speed": 2.0, "trl_speed": 3.5, "trl_compact_speed": 2.2, "naive_speed": 6.0}
AT_MOST = {"trl_memory": 0.45, "naive_memory": 0.25}


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
        planned = {
            name: planned_counts(Work(folder, run_on, standing.batch_size, case.steps), name)
            for name, standing in race.standings.items()
            if ENTRIES[name].layout and standing.batch_size is not None
        }
        for number in range(options.rounds):
            race.run_round(number)
            if options.json:
                write_json(options.json, report(race, planned, origin, options))
    print_report(race, planned, options)
    return 0 if race.is_good(planned) else 1


def planned_counts(work: Work, name: str) -> Counts:
    """Body tokens and head rows of one of our contenders' timed steps, as the plan says."""
    case, pairs = work.case, work.pairs
    layout = Layout(ENTRIES[name].layout or "")
    limit = token_limit(pairs, layout, case.max_tokens)
    shape = BatchShape(work.batch_size, case.pairs_per_step // work.batch_size, 1)
    _, *timed = StepSampler(len(pairs), shape, rank=0, seed=None, limit=limit)
    answers = [len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in pairs]
    body_tokens = head_rows = 0
    for step in timed:
        for batch in step.micro_batches:
            head_rows += sum(answers[pair] for pair in batch)
            if limit is not None:
                body_tokens += sum(limit.lengths[pair] for pair in batch)
            else:
                body_tokens += 2 * len(batch) * max(_longest(pairs[pair]) for pair in batch)
    return {"body_tokens": body_tokens, "head_rows": head_rows}


def _longest(pair: dict[str, list[int]]) -> int:
    return len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))


def report(
    race: Race, planned: dict[str, Counts], origin: str, options: argparse.Namespace
) -> dict[str, Any]:
    """The whole JSON."""
    ratios, why = race.ratios()
    case = race.case
    peak = memory_words(options.device == "cuda" and not options.dry_run)
    return {
        "benchmark": "train",
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
        "error_rule": f"of every step, relative to {TRUTH}'s: at most {case.tolerances}",
        "contenders": {name: standing.as_dict() for name, standing in race.standings.items()},
        "stamps": stamps(MODULE),
    }


def has_targets(options: argparse.Namespace) -> bool:
    return options.device == "cpu" and not options.dry_run


def print_report(race: Race, planned: dict[str, Counts], options: argparse.Namespace) -> None:
    ratios, _ = race.ratios()
    case = race.case
    title = (
        f"{case.shape}: {case.steps} steps of {case.pairs_per_step} pairs, {case.dtype}, "
        f"max_tokens_per_microbatch {case.max_tokens}"
    )
    print_race(title, race.standings, ratios)
    for line in race.miscounts(planned):
        print(f"Not what was planned: {line}")
    if has_targets(options):
        print_targets(targets(ratios, AT_LEAST, AT_MOST))


def case_of(options: argparse.Namespace) -> Case:
    """What the command line asks for."""
    case = race_case()
    if options.device == "cuda":
        case = gpu_case(options.shape, tuple(options.batch_sizes))
    changes = {
        "layers": options.layers,
        "max_tokens": options.max_tokens,
        "pairs_per_step": options.pairs_per_step,
        "steps": options.steps,
        "lora": options.lora or None,
        "checkpointing": False if options.no_checkpointing else None,
    }
    case = replace(case, **{name: value for name, value in changes.items() if value is not None})
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
    gpu = parser.add_argument_group("for --device cuda")
    shapes = [name for name in SHAPES if name not in ("tiny", "race")]
    gpu.add_argument("--shape", choices=shapes, default="0.5b", help="default: %(default)s")
    gpu.add_argument("--layers", type=int, help="in place of the shape's")
    gpu.add_argument("--lora", action="store_true", help="train adapters, not the weights")
    gpu.add_argument(
        "--batch-sizes",
        nargs="+",
        type=int,
        default=[2, 4, 8],
        metavar="N",
        help="pairs in a micro-batch; all but packed layouts get their best of these",
    )
    gpu.add_argument("--max-tokens", type=int, help="of a packed micro-batch; default: 16384")
    gpu.add_argument("--pairs-per-step", type=int, help="default: 32")
    gpu.add_argument("--steps", type=int, help="that are timed; default: 4")
    gpu.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    add_data_option(parser)
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.rounds = options.rounds or (1 if options.dry_run else 3)
    for name in ("layers", "lora", "max_tokens", "pairs_per_step", "steps", "no_checkpointing"):
        if getattr(options, name) and options.device == "cpu":
            parser.error(f"--{name.replace('_', '-')} needs --device cuda; the CPU's race is fixed")
    try:
        case_of(options)
    except ValueError as error:
        parser.error(str(error))
    return options


HELP = """Races whole DPO steps of our layouts, TRL and plain PyTorch, each in processes of its own.
On a CPU it is one race of some 15 minutes on two cores. On a GPU choose the model with --shape.
Exit code 1 means that ours was wrong, failed, or ran other tokens than planned; others may."""


def main() -> None:
    sys.exit(benchmark(parse()))


if __name__ == "__main__":
    main()
