"""Races the building of reference log-probs: our builder, TRL's precompute, and plain PyTorch.

python -m benchmarks.reference --device cpu --json reference.json

Every contender's log-probs are compared with plain PyTorch's before it gets a speed. See
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import program
from benchmarks.program import Program, make_parser, settle
from benchmarks.reference_cases import ReferenceCase, ReferenceWork, gpu_case, race_case, tiny
from benchmarks.reference_child import MODULE as CHILD_MODULE
from benchmarks.reference_contenders import ENTRIES, OURS, TRUTH
from benchmarks.rounds import Contest, Counts, Race
from benchmarks.train_cases import Work
from dpofast.data.packing.collate import Layout
from dpofast.data.packing.packed_row import runs_of_prompts
from dpofast.reference.build.answers import read_answers
from dpofast.reference.build.batches import BatchesOfTokens

CONTEST = Contest(ENTRIES, OURS, TRUTH, CHILD_MODULE)


def benchmark(options: argparse.Namespace) -> int:
    """Run the race; 0 if ours was right, was timed, and ran the planned tokens, else 1."""
    case = case_of(options)
    title = (
        f"{case.shape}: reference log-probs of {case.pairs_per_step} pairs, {case.dtype}, "
        f"max_tokens_per_microbatch {case.max_tokens}"
    )
    return program.benchmark(PROGRAM, case, title, options)


def plan(race: Race, folder: Path, device: str) -> dict[str, Counts]:
    """The counts that our builder must reach."""
    return {OURS: planned_counts(ReferenceWork(folder, device, 1, race.case.steps))}


def planned_counts(work: Work) -> Counts:
    """Body tokens and scored positions of our builder, from its plan."""
    answers = read_answers(work.timed_pairs)
    # The builder's rows hold a prompt once for all of its answers.
    layout = Layout("shared")
    batches = BatchesOfTokens(
        work.case.max_tokens, lambda each: layout.num_tokens(each, runs_of_prompts(each))
    )(answers, answers.first)
    scored = sum(len(answers.ids(answer)[1]) for answer in answers.first.tolist())
    return {"body_tokens": sum(batch.num_tokens for batch in batches), "head_rows": scored}


def case_of(options: argparse.Namespace) -> ReferenceCase:
    """The case that the command line asks for."""
    case = gpu_case(options.shape) if options.device == "cuda" else race_case()
    return tiny(case) if options.dry_run else case


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; defaults depend on the device."""
    options = make_parser(PROGRAM, HELP).parse_args(arguments)
    settle(options)
    return options


PROGRAM = Program(
    "benchmarks.reference",
    CONTEST,
    plan,
    judged="answer",
    at_least={"trl_speed": 1.5},
    at_most={"trl_memory": 1.0},
)
HELP = """Races our builder of reference log-probs, TRL's precompute and plain PyTorch, each in
processes of its own. On a CPU it is one race of some 15 minutes on two cores. On a GPU choose the
model with --shape. Exit code 1 means that ours was wrong, failed, or ran other tokens than planned;
others may."""


def main() -> None:
    sys.exit(benchmark(parse()))


if __name__ == "__main__":
    main()
