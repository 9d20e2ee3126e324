"""Tables of predictions, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from benchmarks.model.head import DESIGNS, TODAY
from benchmarks.model.measured import Measured
from benchmarks.model.predictions import HeadCase, StepCase
from benchmarks.tables import console

# Columns of shares, with the parts that they show. Today's design has no pass over the logits.
SHARES = {
    "logits": "logits",
    "dX": "d_hidden_states",
    "dW": "d_weight",
    "gaps": "gaps",
    "cast": "cast",
}


def print_heads(cases: Sequence[HeadCase], measured: Measured) -> None:
    """Print a line for each head: time, shares, work and chunks of today's design.

    The JSON has the same for the former designs, of which the last columns give only the ratios.
    """
    title = "Predicted: head, forward + backward; parts in % of its time"
    table = Table(title=title, title_justify="left", padding=0)
    table.add_column("head", no_wrap=True)
    former = [each.name for each in DESIGNS[1:]]  # as times over the bare products
    numbers = ("N", "ms", "over floor", *SHARES, "TFLOP", "GB", "launches", "measured ms")
    for name in (*numbers, "measured over floor", *former):
        table.add_column(name, justify="right")
    table.add_column("chunks")
    for case in cases:
        key = (case.num_rows, case.size.hidden, case.size.vocab)
        seconds, floor = measured.heads.get(key), measured.floors.get(key)
        found = case.predictions[TODAY.name]
        table.add_row(
            *(case.name, str(case.num_rows)),
            *(f"{1e3 * found.total:.2f}", f"{case.over_floor:.3f}"),
            *(f"{100 * found.seconds[part] / found.total:.0f}" for part in SHARES.values()),
            *(f"{found.flop / 1e12:.1f}", f"{found.bytes / 1e9:.1f}", str(found.launches)),
            f"{1e3 * seconds:.2f}" if seconds else "-",
            f"{seconds / floor:.3f}" if seconds and floor else "-",
            *(f"{case.predictions[name].total / case.floor:.2f}" for name in former),
            _chunks(found.chunks),
        )
    console().print(table)


def print_capped(capped: dict[str, dict[str, float]], num_rows: int) -> None:
    """Print what the heads would take with a soft cap, by back end."""
    title = f"Predicted: with a soft cap and {num_rows} rows, over the floor"
    table = Table(title=title, title_justify="left")
    for name in ("head", *next(iter(capped.values()))):
        table.add_column(name, justify="left" if name == "head" else "right")
    for name, ratios in capped.items():
        table.add_row(name, *(f"{ratio:.3f}" for ratio in ratios.values()))
    console().print(table)


def print_sensitivity(moved: dict[str, dict[str, Any]]) -> None:
    """Print the assumptions on which the worst ratio depends."""
    title = "The worst head_over_floor, if an assumption is at an end of its range"
    table = Table(title=title, title_justify="left")
    for name in ("assumption", "value", "range", "head_over_floor", "source"):
        table.add_column(name)
    for name, each in moved.items():
        low, high = each["range"]
        at_low, at_high = each["head_over_floor"]
        table.add_row(
            *(name, f"{each['value']:.4g}", f"{low:.4g} to {high:.4g}"),
            *(f"{at_low:.3f} to {at_high:.3f}", each["source"]),
        )
    console().print(table)


def print_steps(shape: str, cases: Sequence[StepCase], measured: Measured) -> None:
    """Print a line for each way to run a row of a step.

    What was measured is the time of whole steps per token, optimizer included, times the row's
    tokens.
    """
    first = cases[0].body
    title = (
        f"Predicted: {shape}, a row of {first.tokens} tokens, {len(first.lengths) // 2} pairs, "
        f"{sum(first.lengths)} scored"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("layers")
    names = ("checkpointing", "row ms", "products ms", "elementwise ms", "attention ms")
    for name in (*names, "head ms", "launches", "optimizer ms", "measured, optimizer included"):
        table.add_column(name, justify="right")
    for case in cases:
        work = case.body.work
        seconds = measured.steps.get((shape, case.checkpointing, case.fused))
        table.add_row(
            "fused" if case.fused else "stock",
            "yes" if case.checkpointing else "no",
            *(
                f"{1e3 * each:.1f}"
                for each in (
                    case.row,
                    *(work[kind].seconds for kind in ("products", "elementwise", "attention")),
                    case.head.total,
                )
            ),
            str(case.body.launches + case.head.launches),
            f"{1e3 * case.optimizer:.1f}",
            f"{1e3 * seconds * case.body.tokens:.1f}" if seconds else "-",
        )
    console().print(table)


def _chunks(chunks: Sequence[int]) -> str:
    """How many chunks there are, and between which numbers their rows are."""
    if len(chunks) == 1:
        return "1"
    return f"{len(chunks)}: {min(chunks)} to {max(chunks)}"
