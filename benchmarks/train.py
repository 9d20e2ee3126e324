"""Races whole DPO training steps: our layouts, TRL, and textbook DPO in plain PyTorch.

python -m benchmarks.train --device cpu --json train.json
python -m benchmarks.train --device cpu --answers 4 --json train-groups.json
python -m benchmarks.train --device cpu --shape hybrid --json train-hybrid.json

Every contender's losses are compared with plain PyTorch's before it gets a speed. See
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks import program
from benchmarks.harness import positive
from benchmarks.program import Program, make_parser, settle
from benchmarks.rounds import Contest, Counts, Race
from benchmarks.train_cases import Case, Work, gpu_case, race_case, tiny, with_answers
from benchmarks.train_child import MODULE as CHILD_MODULE
from benchmarks.train_contenders import (
    ENTRIES,
    OF_ANSWERS,
    OF_HYBRIDS,
    OF_PAIRS,
    TRUTH,
)
from dpofast.data.packing.collate import Layout
from dpofast.data.packing.plan import BatchShape, StepSampler
from dpofast.data.packing.prompt_groups import PromptGroups
from dpofast.data.packing.token_limit import token_limit

HYBRID = "hybrid"  # a shape


def contest(names: tuple[str, ...]) -> Contest:
    """The race of these contenders, the first of which is ours."""
    return Contest({name: ENTRIES[name] for name in names}, names[0], TRUTH, CHILD_MODULE)


def benchmark(options: argparse.Namespace) -> int:
    """Run the race; 0 if ours was right, was timed, and ran the planned tokens, else 1."""
    case = case_of(options)
    answers = "" if case.answers == 2 else f" ({case.answers} answers to a prompt)"
    title = (
        f"{case.shape}: {case.steps} steps of {case.pairs_per_step} pairs{answers}, {case.dtype}, "
        f"max_tokens_per_microbatch {case.max_tokens}"
    )
    return program.benchmark(program_of(options), case, title, options)


def program_of(options: argparse.Namespace) -> Program:
    """The race that the command line asks for; a hybrid's targets are for the file's own pairs.

    Other models have targets for 2 and for 4 answers.
    """
    if options.answers == 2:
        return HYBRIDS if options.shape == HYBRID else PAIRS
    has_targets = options.answers == 4 and options.shape != HYBRID
    return ANSWERS if has_targets else replace(ANSWERS, at_least={})


def plan(race: Race, folder: Path, device: str) -> dict[str, Counts]:
    """The counts that each of our contenders must reach."""
    return {
        name: planned_counts(Work(folder, device, standing.batch_size, race.case.steps), name)
        for name, standing in race.standings.items()
        if ENTRIES[name].layout and standing.batch_size is not None
    }


def planned_counts(work: Work, name: str) -> Counts:
    """Body tokens and scored positions of one of our contenders, planned for its timed steps."""
    case, pairs = work.case, work.pairs
    layout = Layout(ENTRIES[name].layout or "", merges=ENTRIES[name].merges)
    limit = token_limit(PromptGroups.of(pairs), layout, case.max_tokens)
    shape = BatchShape(work.batch_size, case.pairs_per_step // work.batch_size, 1)
    # No seed: the race trains in the file's order. Its first step isn't timed.
    _, *timed = StepSampler(len(pairs), shape, rank=0, seed=None, limit=limit)
    body_tokens = head_rows = 0
    for step in timed:
        for index, batch in enumerate(step.micro_batches):
            parts = [[pair] for pair in batch]
            if limit is not None:
                assert step.parts is not None, "rows are packed"
                parts = step.parts[index]
                body_tokens += sum(one.tokens for part in parts for one in limit.parts(part))
            else:
                # Padding makes both sequences of every pair as long as the micro-batch's longest.
                body_tokens += 2 * len(batch) * max(_longest(pairs[pair]) for pair in batch)
            head_rows += sum(_scored([pairs[pair] for pair in part]) for part in parts)
    return {"body_tokens": body_tokens, "head_rows": head_rows}


def _scored(group: list[dict[str, list[int]]]) -> int:
    """Tokens of the answers of some pairs of one prompt, which run once for all of them."""
    answers = [tuple(pair[side]) for pair in group for side in ("chosen_ids", "rejected_ids")]
    return sum(map(len, set(answers) if len(group) > 1 else answers))


def _longest(pair: dict[str, list[int]]) -> int:
    return len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))


def case_of(options: argparse.Namespace) -> Case:
    """The case that the command line asks for."""
    case = race_case(options.shape)
    if options.device == "cuda":
        case = gpu_case(options.shape, tuple(options.batch_sizes))
    if options.answers != 2:
        case = with_answers(case, options.answers)
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
    """Parse the command line; defaults depend on the device."""
    parser = make_parser(replace(PAIRS, contest=contest(tuple(ENTRIES))), HELP)
    parser.add_argument(
        "--answers",
        type=positive,
        default=2,
        metavar="K",
        help="answers to a prompt, all of whose pairs are trained; default: 2, the file's pairs",
    )
    gpu = parser.add_argument_group("for --device cuda")
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
    gpu.add_argument("--pairs-per-step", type=int, help="default: 32; 24 with --answers")
    gpu.add_argument("--steps", type=int, help="that are timed; default: 4; 2 with --answers")
    gpu.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    options = parser.parse_args(arguments)
    settle(options)
    if options.device == "cpu" and options.shape not in ("race", HYBRID):
        parser.error(f"--shape {options.shape} needs --device cuda; a CPU can race {HYBRID}")
    for name in ("layers", "lora", "max_tokens", "pairs_per_step", "steps", "no_checkpointing"):
        if getattr(options, name) and options.device == "cpu":
            parser.error(f"--{name.replace('_', '-')} needs --device cuda; the CPU's race is fixed")
    for name in (*options.contenders, *options.skip):
        if name not in program_of(options).contest.entries:
            kind = HYBRID if options.shape == HYBRID else f"--answers {options.answers}"
            parser.error(f"{name} takes no part in a race with {kind}")
    try:
        case_of(options)
    except ValueError as error:
        parser.error(str(error))
    return options


PAIRS = Program(
    "benchmarks.train",
    contest(OF_PAIRS),
    plan,
    judged="step",
    at_least={"padded_speed": 2.0, "trl_speed": 3.5, "trl_compact_speed": 2.2, "naive_speed": 6.0},
    at_most={"trl_memory": 0.45, "naive_memory": 0.25},
)
ANSWERS = replace(
    PAIRS,
    contest=contest(OF_ANSWERS),
    at_least={"ungrouped_speed": 2.5, "trl_speed": 8.0, "naive_speed": 12.0},
    at_most={},
)
HYBRIDS = replace(PAIRS, contest=contest(OF_HYBRIDS), at_least={"padded_speed": 1.3}, at_most={})
HELP = """Races whole DPO steps of our layouts, TRL and plain PyTorch, each in processes of its own.
With --answers 4 each prompt has four answers, and our layout with groups races the one without.
With --shape hybrid the model is a small Qwen3.5, three of whose four layers have a state. On a CPU
a race takes some 15 minutes on two cores, and 25 with --answers 4. On a GPU --shape chooses the
model. Exit code 1 means that ours was wrong, failed, or ran other tokens than planned;
others may."""


def main() -> None:
    sys.exit(benchmark(parse()))


if __name__ == "__main__":
    main()
