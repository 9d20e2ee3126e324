"""Compares losses and betas: trains the demo's warmed-up model with each of them in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpofast.demo.comparison_files import COMPARISON_FILE, plot_comparison, write_markdown
from dpofast.demo.screen import Screen
from dpofast.demo.training import Measured, Recipe, Start, prepare, train
from dpofast.errors import ModelError, NonFiniteError
from dpofast.monitor.summary import hardware, versions, write_json

# Trains a recipe in a folder and measures the trained model.
TrainFunction = Callable[[Recipe, Path], Measured]


@dataclass(frozen=True)
class Run:
    """A row of the comparison.

    Attributes:
        loss_type: name of the loss.
        beta: its beta.
        seconds: duration of training and measuring.
        measured: measurements of `measurements`; None if the run has failed.
        error: why the run has failed; None if it hasn't.
    """

    loss_type: str
    beta: float
    seconds: float
    measured: dict[str, float] | None
    error: str | None = None


def compare(folder: Path, seed: int, recipes: Sequence[Recipe]) -> dict[str, Any]:
    """Train the same model with each recipe, and write and show what has come of it.

    Args:
        folder: folder to write data, models, the reference store, the runs and the comparison to.
        seed: random seed of data, weights and all runs.
        recipes: losses with their betas, in the order of the rows.

    Returns:
        The content of comparison.json.
    """
    screen = Screen()
    screen.title(
        f"dpofast demo: the same small model, trained in {len(recipes)} ways",
        "On two CPU cores the warm-up takes about two minutes, and each run half a minute.",
    )
    start = prepare(folder, seed, screen)

    def train_one(recipe: Recipe, output_dir: Path) -> Measured:
        return train(start, recipe, output_dir, screen)[1]

    runs: list[Run] = []
    for recipe in recipes:
        run = run_recipe(recipe, folder, start, train_one)
        runs.append(run)
        mean_seconds = sum(run.seconds for run in runs) / len(runs)
        screen.compared(asdict(run), len(recipes) - len(runs), mean_seconds)
        # Written after every run, so that a comparison that is interrupted leaves what it has.
        content = _content(start, runs)
        write_json(folder / COMPARISON_FILE, content)
    write_markdown(content, folder)
    plot_comparison(content, folder)
    screen.comparison(content, folder)
    return content


def run_recipe(recipe: Recipe, folder: Path, start: Start, train_one: TrainFunction) -> Run:
    """Train a recipe in a folder of its own. A run that diverges becomes a row without figures."""
    started = time.monotonic()
    measured, error = None, None
    try:
        after = train_one(recipe, folder / "runs" / f"{recipe.loss_type}-{recipe.beta}")
        measured = measurements(start, after)
    except (ModelError, NonFiniteError) as failure:
        error = str(failure)
    seconds = time.monotonic() - started
    return Run(recipe.loss_type, recipe.beta, seconds, measured, error)


def measurements(start: Start, after: Measured) -> dict[str, float]:
    """The figures of a row: means over held-out pairs, by the same yardstick for every loss.

    Log-ratios are those to the warmed-up model, in nats and summed over an answer's tokens, also
    for losses that have no reference, and without beta.
    """
    change = start.logps_change(after)
    return {
        "eval_accuracy": after.reward_accuracy,
        "policy_accuracy_equal_length": after.policy.equal_length_accuracy,
        "exact_answers": after.exact,
        "margin": float(change[0] - change[1]),
        "chosen_logps_change": float(change[0]),
        "rejected_logps_change": float(change[1]),
    }


def _content(start: Start, runs: Sequence[Run]) -> dict[str, Any]:
    return {
        "seed": start.seed,
        "held_out_pairs": len(start.data.held_out),
        "before": measurements(start, start.measured),
        "runs": [asdict(run) for run in runs],
        "versions": versions(),
        "hardware": hardware(),
    }
