"""Runs the demo: makes data and a model, warms it up, trains it, and shows what changed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from dpofast.demo.data import DemoData
from dpofast.demo.screen import Sample, Samples, Screen
from dpofast.demo.training import Measured, Recipe, Start, prepare, train
from dpofast.monitor.plots import PLOT_FILE, plot_run
from dpofast.monitor.summary import SUMMARY_FILE, hardware, versions, write_json
from dpofast.train.reports.card_facts import examples_of
from dpofast.train.reports.summary import reference_summary

REFERENCE_COUNTS = ("ref_forward_passes", "ref_rows_scored", "ref_store_hits")


def run_demo(folder: Path, seed: int = 0, recipe: Recipe | None = None) -> dict[str, Any]:
    """Run the whole demo.

    Args:
        folder: folder to write data, models, the reference store, the plot and summary.json to.
        seed: random seed of data and weights.
        recipe: loss and beta; by default Recipe(), which is DPO.

    Returns:
        The content of summary.json.
    """
    started = time.monotonic()
    recipe = recipe or Recipe()
    screen = Screen()
    screen.title(
        "dpofast demo: a small language model learns which answers people prefer",
        "It takes about three minutes on two CPU cores.",
    )
    start = prepare(folder, seed, screen)
    trainer, after = train(start, recipe, folder / "dpo", screen)
    trainer.save_model()
    trainer.create_model_card(model_name="dpofast demo")

    summary = _summary(trainer, start, after) | {
        "loss_type": recipe.loss_type,
        "beta": recipe.beta,
        "seed": seed,
        "wall_seconds": time.monotonic() - started,
    }
    write_json(folder / SUMMARY_FILE, summary)
    plot_run(trainer.state.log_history, folder / PLOT_FILE, f"{recipe.title}, on the demo's pairs")
    samples = _samples(start.data, start.measured, after)
    screen.result(summary, samples, folder, examples_of(trainer))
    return summary


def _summary(trainer: Any, start: Start, after: Measured) -> dict[str, Any]:
    read, stored, before = reference_summary(trainer.reference), start.stored, start.measured
    change = start.logps_change(after)
    training = json.loads((Path(trainer.args.output_dir) / SUMMARY_FILE).read_text("utf-8"))
    return {
        "first_loss": trainer.first_loss,
        "first_loss_expected": _expected_first_loss(trainer.pair_loss),
        "eval_accuracy_before": before.reward_accuracy,
        "eval_accuracy_after": after.reward_accuracy,
        "policy_accuracy_before": before.policy.accuracy,
        "policy_accuracy_after": after.policy.accuracy,
        "policy_accuracy_equal_length_before": before.policy.equal_length_accuracy,
        "policy_accuracy_equal_length_after": after.policy.equal_length_accuracy,
        "exact_answers_before": before.exact,
        "exact_answers_after": after.exact,
        "chosen_logps_change": float(change[0]),
        "rejected_logps_change": float(change[1]),
        "pairs_per_second": training["pairs_per_second"],
        "train_pairs": len(start.data.train),
        "held_out_pairs": len(start.pairs),
        **{name: stored[name] + read[name] for name in REFERENCE_COUNTS},
        "versions": versions(),
        "hardware": hardware(),
    }


def _expected_first_loss(loss: Any) -> float | None:
    """The loss while policy and reference are the same; None for a loss without a reference."""
    import torch

    from dpofast_kernels import UnpairedLoss

    if loss.is_reference_free:
        return None
    if isinstance(loss, UnpairedLoss):
        labels, zeros = torch.tensor([True, False]), torch.zeros(2, dtype=torch.float64)
        return float(loss.sequence_loss(zeros, labels, zeros[0])[0].mean())
    return float(loss.first_value(torch.ones(1, 2, dtype=torch.int64)))


def _samples(data: DemoData, before: Measured, after: Measured) -> Samples:
    """Compare answers before and after, and pick two that became right."""
    became_right, became_wrong = [], 0
    for row, old, new in zip(data.held_out, before.answers, after.answers, strict=True):
        right = row["chosen"][0]["content"]
        if new == right != old:
            became_right.append(Sample(row["prompt"][0]["content"], old, new))
        became_wrong += old == right != new
    return Samples(became_right[:2], len(became_right), became_wrong)
