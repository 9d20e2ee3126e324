"""Writes a comparison of losses: a table in Markdown, and a picture over beta."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

COMPARISON_FILE = "comparison.json"
TABLE_FILE = "comparison.md"
PICTURE_FILE = "comparison.png"

# Title and format of each figure of a row, by its name in comparison.json. The titles wrap at
# their words, so that the table fits into a terminal of 80 columns. With z, no figure is -0.0.
COLUMNS: dict[str, tuple[str, str]] = {
    "eval_accuracy": ("chosen gained more", ".1%"),
    "policy_accuracy_equal_length": ("ranked right, equal length", ".1%"),
    "exact_answers": ("answers right", ".1%"),
    "margin": ("margin", "+z.1f"),
    "chosen_logps_change": ("chosen log-prob", "+z.1f"),
    "rejected_logps_change": ("rejected log-prob", "+z.1f"),
}
LEGEND = (
    "On {held_out_pairs} held-out pairs. Chosen gained more: share of pairs whose chosen answer "
    "has gained more log-prob by the training than the rejected one. Ranked right, equal length: "
    "share of the pairs of equally long answers whose chosen answer is more probable. Answers "
    "right: share of greedy answers that are right to the letter. Margin and log-probs: mean "
    "changes by the training, in nats, summed over an answer, without beta."
)
# Title and unit of each panel, and its figures, the second one with a dashed line.
PANELS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("chosen gained more log-prob than rejected", "share of pairs", ("eval_accuracy",)),
    ("greedy answers right to the letter", "share of prompts", ("exact_answers",)),
    ("margin: gain of chosen minus gain of rejected", "nats", ("margin",)),
    (
        "change of log-probs: chosen (line), rejected (dashed)",
        "nats",
        ("chosen_logps_change", "rejected_logps_change"),
    ),
)


def table_rows(content: dict[str, Any]) -> Iterator[list[str]]:
    """Yield the cells of the table's rows: loss, beta and the figures.

    The first row is the model before training. A run that has failed has `failed` for a figure.

    Args:
        content: content of comparison.json.
    """
    yield ["before", "", *_figures(content["before"])]
    for run in content["runs"]:
        yield [run["loss_type"], f"{run['beta']:g}", *_figures(run["measured"])]


def headings() -> list[str]:
    """The headings of the table's columns."""
    return ["loss", "beta", *(title for title, _ in COLUMNS.values())]


def failures(content: dict[str, Any]) -> list[str]:
    """A sentence for each run that has failed."""
    return [
        f"{run['loss_type']}, beta {run['beta']:g}: {run['error']}"
        for run in content["runs"]
        if run["error"] is not None
    ]


def write_markdown(content: dict[str, Any], folder: Path) -> None:
    """Write the table and what its columns mean to comparison.md.

    Args:
        content: content of comparison.json.
        folder: folder of the file; it must exist.
    """
    aligned = ["---", *["---:"] * (len(headings()) - 1)]
    lines = [f"| {' | '.join(cells)} |" for cells in (headings(), aligned, *table_rows(content))]
    lines += ["", LEGEND.format_map(content)]
    for sentence in failures(content):
        lines += ["", sentence]
    (folder / TABLE_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def plot_comparison(content: dict[str, Any], folder: Path) -> None:
    """Draw the figures over beta, a line for each loss, to comparison.png.

    A run that has failed is a gap in its line, with a cross at the lower edge.

    Args:
        content: content of comparison.json.
        folder: folder of the file; it must exist.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a screen and without touching pyplot's state
    figure.suptitle("Held-out pairs of dpofast demo, after training; dotted: before")
    losses = list(dict.fromkeys(run["loss_type"] for run in content["runs"]))
    for axes, (title, unit, names) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        axes.set(title=title, xlabel="beta", ylabel=unit, xscale="log")
        if names != ("eval_accuracy",):  # nothing has gained log-prob before training
            axes.axhline(content["before"][names[0]], color="grey", linestyle=":")
        for index, loss in enumerate(losses):
            runs = sorted(
                (run for run in content["runs"] if run["loss_type"] == loss),
                key=lambda run: run["beta"],
            )
            _plot_loss(axes, loss, runs, names, f"C{index}")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(folder / PICTURE_FILE, dpi=110)


def _plot_loss(
    axes: Any, loss: str, runs: list[dict[str, Any]], names: tuple[str, ...], color: str
) -> None:
    betas = [run["beta"] for run in runs]
    for index, name in enumerate(names):
        values = [float("nan") if not run["measured"] else run["measured"][name] for run in runs]
        style, label = ("s--", None) if index else ("o-", loss)
        axes.plot(betas, values, style, color=color, label=label)
    failed = [run["beta"] for run in runs if not run["measured"]]
    # In this transform, y goes from 0 at the lower edge to 1 at the upper one.
    axes.plot(failed, [0.03] * len(failed), "x", color=color, transform=axes.get_xaxis_transform())


def _figures(measured: dict[str, float] | None) -> list[str]:
    if measured is None:
        return ["failed", *[""] * (len(COLUMNS) - 1)]
    return [format(measured[name], form) for name, (_, form) in COLUMNS.items()]
