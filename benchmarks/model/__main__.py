"""Predicts the time of the head and of a step on a GPU, and says what the prediction rests on.

python -m benchmarks.model --card h200 --json FILE   # five heads, and what each assumption does
python -m benchmarks.model --shape 7b --card h200    # one shape: its head and its step

Nothing runs on a GPU. Measured figures of the card are shown beside the prediction where
benchmarks/results/ has some.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness import positive
from benchmarks.model.assumptions import CARDS, Assumptions
from benchmarks.model.head import HEADS, Size
from benchmarks.model.measured import Measured, read_measured
from benchmarks.model.predictions import (
    TOKENS,
    HeadCase,
    StepCase,
    capped_over_floor,
    head_cases,
    sensitivity,
    step_cases,
)
from benchmarks.model.tables import print_capped, print_heads, print_sensitivity, print_steps
from benchmarks.report import RESULTS
from benchmarks.stamps import stamps
from benchmarks.train_cases import SHAPES
from dpofast.monitor.summary import write_json

# Most that the head may take over the bare products.
TARGET = 1.08
CAPPED_TOKENS = 8192  # scored by the heads with a soft cap


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    assumed, measured = CARDS[options.card], read_measured(options.results, options.card)
    try:
        steps = step_cases(options.shape, options.row_tokens, assumed) if options.shape else []
    except ValueError:
        sys.exit(f"--row-tokens {options.row_tokens}: no pair fits into so short a row; take more.")
    heads = heads_of(options)
    cases = head_cases(heads, options.tokens, assumed)
    moved = sensitivity(heads, options.tokens, assumed)
    print(f"Predicted for {options.card}, not measured; see benchmarks/model/assumptions.py.")
    print_heads(cases, measured)
    print_sensitivity(moved)
    capped = capped_over_floor(heads, CAPPED_TOKENS, assumed)
    print_capped(capped, CAPPED_TOKENS)
    worst = max(case.over_floor for case in cases)
    print(f"head_over_floor {worst:.3f}, at most {TARGET}: {_verdict(worst)}")
    if steps:
        print_steps(options.shape, steps, measured)
    if options.json:
        write_json(options.json, report(options, assumed, cases, capped, moved, steps, measured))
    return 0


def heads_of(options: argparse.Namespace) -> dict[str, Size]:
    """The heads that the command line asks for."""
    if options.hidden:
        return {"custom": Size(options.hidden, options.vocab)}
    if options.shape:
        fields = SHAPES[options.shape][1]
        return {options.shape: Size(fields["hidden_size"], fields["vocab_size"])}
    return HEADS


def report(
    options: argparse.Namespace,
    assumed: Assumptions,
    cases: list[HeadCase],
    capped: dict[str, dict[str, float]],
    moved: dict[str, Any],
    steps: list[StepCase],
    measured: Measured,
) -> dict[str, Any]:
    """The whole JSON; all times in seconds."""
    worst = max(case.over_floor for case in cases)
    found = []
    for case in cases:
        key = (case.num_rows, case.size.hidden, case.size.vocab)
        times = {"head": measured.heads.get(key), "floor": measured.floors.get(key)}
        found.append({**case.as_dict(), "measured": times})
    return {
        "benchmark": "model",
        "is_prediction": True,
        "card": options.card,
        "ratios": {"head_over_floor": worst},
        "targets": {"head_over_floor": {"value": worst, "bound": TARGET, "holds": worst <= TARGET}},
        "sensitivity": moved,
        "assumptions": vars(assumed),
        "heads": found,
        "capped_over_floor": capped,
        "steps": {options.shape: [each.as_dict() for each in steps]} if steps else {},
        "stamps": stamps("benchmarks.model"),
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    shapes = [name for name, (_, fields) in SHAPES.items() if "vocab_size" in fields]
    add("--card", choices=CARDS, default="h200", help="default: %(default)s")
    add("--shape", choices=shapes, help="this model's head and step; default: five heads")
    add("--hidden", type=positive, help="of another head; needs --vocab")
    add("--vocab", type=positive, help="of another head; needs --hidden")
    add("--tokens", nargs="+", type=positive, default=list(TOKENS), help="scored by the head")
    add("--row-tokens", type=positive, default=8192, help="of the step's row; default: %(default)s")
    add("--results", type=Path, default=RESULTS, help="default: %(default)s")
    add("--json", type=Path, help="write everything to this file, too")
    options = parser.parse_args(arguments)
    if bool(options.hidden) != bool(options.vocab):
        parser.error("--hidden and --vocab go together")
    if options.hidden and options.shape:
        parser.error("--shape has a head of its own; leave out --hidden and --vocab")
    return options


def _verdict(worst: float) -> str:
    return "holds" if worst <= TARGET else "is missed"


if __name__ == "__main__":
    sys.exit(main())
