"""Runs the demo: makes data and a model, warms it up, trains it by DPO, and shows what changed."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpofast.demo.data import DemoData, make_data, save_rows
from dpofast.demo.measure import (
    PolicyScores,
    answer,
    exact_share,
    reward_accuracy,
    score_policy,
)
from dpofast.demo.model import make_model, make_tokenizer
from dpofast.demo.screen import ProgressCallback, Sample, Samples, Screen
from dpofast.demo.warmup import warm_up
from dpofast.monitor.plots import PLOT_FILE, plot_run
from dpofast.monitor.summary import SUMMARY_FILE, hardware, versions, write_json
from dpofast.train.reports.summary import reference_summary

BETA = 1.0  # ten times the usual, because a tiny model drifts away from its reference easily
EPOCHS = 6
LEARNING_RATE = 2e-4
PAIRS_PER_STEP = 16

REFERENCE_COUNTS = ("ref_forward_passes", "ref_rows_scored", "ref_store_hits")


@dataclass(frozen=True)
class Measured:
    """Measurements of a model on the held-out pairs.

    Attributes:
        reward_accuracy: share of pairs whose chosen answer has the higher reward.
        policy: the model's log-probs of both answers.
        answers: generated answers, one for each held-out prompt.
        exact: share of the generated answers that are right to the letter.
    """

    reward_accuracy: float
    policy: PolicyScores
    answers: list[str]
    exact: float


def run_demo(folder: Path, seed: int = 0) -> dict[str, Any]:
    """Run the whole demo.

    Args:
        folder: folder to write data, models, the reference store, the plot and summary.json to.
        seed: random seed of data and weights.

    Returns:
        The content of summary.json.
    """
    started = time.monotonic()
    _quiet()
    screen = Screen()
    screen.title("dpofast demo: a small language model learns which answers people prefer")

    data = make_data(seed)
    save_rows(data.train, folder / "data" / "train.jsonl")
    save_rows(data.held_out, folder / "data" / "held_out.jsonl")
    screen.data(data, folder / "data")

    _warm_up(data, folder / "warm", seed, screen)

    # One trainer scores the answers, and another one trains. The second finds all log-probs in the
    # store, as any later run on these pairs would.
    stored = build_references(make_trainer(folder, data, seed))
    screen.reference(stored, folder / "reference")

    trainer = make_trainer(folder, data, seed)
    trainer.score_datasets()
    ref_logps = trainer.eval_sets()["eval"].ref_logps
    before = _measure(trainer, data, ref_logps)
    with screen.progress("training by DPO") as progress:
        trainer.add_callback(ProgressCallback(progress))
        trainer.train()
    after = _measure(trainer, data, ref_logps)
    trainer.save_model()
    trainer.create_model_card(model_name="dpofast demo")

    summary = _summary(trainer, stored, before, after) | {
        "seed": seed,
        "wall_seconds": time.monotonic() - started,
    }
    write_json(folder / SUMMARY_FILE, summary)
    plot_run(trainer.state.log_history, folder / PLOT_FILE, "DPO on the demo's pairs")
    screen.result(summary, _samples(data, before, after), folder)
    return summary


def _quiet() -> None:
    """Silence log lines and progress bars, since the screen shows all of that itself."""
    import datasets
    import transformers

    logging.getLogger("dpofast").setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def make_trainer(folder: Path, data: DemoData, seed: int) -> Any:
    """Make a DPOTrainer that trains the warmed-up model in float32."""
    import datasets
    from transformers import PrinterCallback

    from dpofast import DPOConfig, DPOTrainer

    config = DPOConfig(
        output_dir=str(folder / "dpo"),
        reference_store=str(folder / "reference"),
        beta=BETA,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=PAIRS_PER_STEP,
        per_device_eval_batch_size=PAIRS_PER_STEP,
        eval_strategy="epoch",
        save_strategy="no",
        logging_steps=2,
        bf16=False,
        gradient_checkpointing=False,
        seed=seed,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = DPOTrainer(
        model=str(folder / "warm"),
        args=config,
        train_dataset=datasets.Dataset.from_list(data.train),
        eval_dataset=datasets.Dataset.from_list(data.held_out),
    )
    trainer.dataset_names, trainer.eval_dataset_names = ["train.jsonl"], ["held_out.jsonl"]
    trainer.remove_callback(PrinterCallback)  # with disable_tqdm, it prints every log to stdout
    return trainer


def build_references(trainer: Any) -> dict[str, Any]:
    """Score the answers of both datasets that are missing from the store.

    Returns:
        Counts as in summary.json.
    """
    trainer.score_datasets()
    return reference_summary(trainer.reference)


def _warm_up(data: DemoData, folder: Path, seed: int, screen: Screen) -> None:
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed)
    with screen.progress("supervised warm-up") as progress:
        warm_up(model, tokenizer, data.warmup, on_step=progress)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    screen.warmed_up(model.num_parameters(), folder)


def _measure(trainer: Any, data: DemoData, ref_logps: np.ndarray) -> Measured:
    tokenizer = trainer.processing_class
    prompts = [row["prompt"][0]["content"] for row in data.held_out]
    answers = answer(trainer.model, tokenizer, prompts)
    policy = score_policy(trainer.model, trainer.eval_dataset, tokenizer.pad_token_id)
    return Measured(
        reward_accuracy=reward_accuracy(policy.logps, ref_logps),
        policy=policy,
        answers=answers,
        exact=exact_share(answers, data.held_out),
    )


def _summary(
    trainer: Any, stored: dict[str, Any], before: Measured, after: Measured
) -> dict[str, Any]:
    read = reference_summary(trainer.reference)
    change = after.policy.logps.mean(axis=0) - before.policy.logps.mean(axis=0)
    training = json.loads((Path(trainer.args.output_dir) / SUMMARY_FILE).read_text("utf-8"))
    return {
        "first_loss": trainer.first_loss,
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
        "train_pairs": len(trainer.train_dataset),
        "held_out_pairs": len(trainer.eval_dataset),
        **{name: stored[name] + read[name] for name in REFERENCE_COUNTS},
        "versions": versions(),
        "hardware": hardware(),
    }


def _samples(data: DemoData, before: Measured, after: Measured) -> Samples:
    """Compare answers before and after, and pick two that became right."""
    became_right, became_wrong = [], 0
    for row, old, new in zip(data.held_out, before.answers, after.answers, strict=True):
        right = row["chosen"][0]["content"]
        if new == right != old:
            became_right.append(Sample(row["prompt"][0]["content"], old, new))
        became_wrong += old == right != new
    return Samples(became_right[:2], len(became_right), became_wrong)
