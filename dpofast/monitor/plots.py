"""Plots a run: loss, margins, accuracy, log-probs and more over its steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

PLOT_FILE = "training.png"

# Title, unit of the y axis, and names of the logged values of each panel.
PANELS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("loss", "nats", ("loss",)),
    ("margin of the rewards", "nats", ("rewards/margins",)),
    ("chosen rewarded above rejected", "share of pairs", ("rewards/accuracies",)),
    ("log-prob of an answer", "nats", ("logps/chosen", "logps/rejected")),
    ("log-ratio to the reference", "nats per token", ("logratios/chosen", "logratios/rejected")),
    ("gradient norm", "", ("grad_norm",)),
)


def plot_run(log_history: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draws training (lines) and evaluation (points) into a PNG.

    Args:
        log_history: one dict per log event, with `step`, as transformers' TrainerState keeps them.
        path: file of the PNG; its folder must exist.
        title: text above the panels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 7.5), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a screen and without touching pyplot's state
    figure.suptitle(title)
    prefixes = _evaluation_prefixes(log_history)
    for axes, (name, unit, keys) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        # A panel with two values tells chosen from rejected by colour, and names them.
        for index, key in enumerate(keys):
            side = key.rpartition("/")[2] if len(keys) > 1 else "training"
            axes.plot(*_series(log_history, key), color=f"C{index}", label=side)
            for marker, prefix in zip(cycle("os^vDX"), prefixes):
                label = f"{prefix}{side}" if len(keys) > 1 else prefix.rstrip("_")
                series = _series(log_history, f"{prefix}{key}")
                if series[0]:
                    axes.plot(*series, marker, color=f"C{index}", label=label)
        axes.set(title=name, xlabel="optimizer step", ylabel=unit)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


def _evaluation_prefixes(log_history: Sequence[dict[str, Any]]) -> list[str]:
    """The prefixes of evaluation metrics: eval_, or eval_NAME_ for every named set."""
    keys = {key for log in log_history for key in log}
    return sorted(
        key.removesuffix("loss")
        for key in keys
        if key.startswith("eval_") and key.endswith("_loss")
    )


def _series(log_history: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one logged name."""
    points = [(log["step"], log[key]) for log in log_history if key in log]
    return [step for step, _ in points], [value for _, value in points]
