"""Prints the demo's progress and results."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import TrainerCallback

from dpofast.demo.comparison_files import (
    COMPARISON_FILE,
    LEGEND,
    PICTURE_FILE,
    TABLE_FILE,
    failures,
    headings,
    table_rows,
)
from dpofast.demo.data import DemoData
from dpofast.monitor.plots import PLOT_FILE
from dpofast.monitor.summary import SUMMARY_FILE

# Called after each step with the step's number, the number of steps and the loss.
StepFunction = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Sample:
    """A held-out prompt, and the model's answer to it before and after DPO."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class Samples:
    """How DPO changed the answers.

    Attributes:
        shown: a few answers that became right.
        became_right: number of all answers that became right.
        became_wrong: number of all answers that became wrong.
    """

    shown: list[Sample]
    became_right: int
    became_wrong: int


class ProgressCallback(TrainerCallback):
    """Passes the losses that the Trainer logs on to a progress bar."""

    def __init__(self, on_step: StepFunction) -> None:
        self.on_step = on_step

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any
    ) -> None:
        if "loss" in logs:
            self.on_step(state.global_step, state.max_steps, logs["loss"])


class Screen:
    """Prints the numbered sections of the demo, with progress bars for the long ones."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        self.section = 0

    def title(self, text: str, duration: str) -> None:
        """Print what will happen, and how long it will take."""
        self.console.print(f"\n[bold]{text}[/bold]")
        self._note(duration)

    def data(self, data: DemoData, folder: Path) -> None:
        """Print how many pairs there are, and a few of them."""
        self._heading(f"{len(data.train)} preference pairs, {len(data.held_out)} more held out")
        table = Table("prompt", "chosen", "rejected", box=None, padding=(0, 2, 0, 2))
        for row in data.train[:4]:
            table.add_row(*(row[side][0]["content"] for side in ("prompt", "chosen", "rejected")))
        self.console.print(table)
        self._note(
            "Rejected answers are wrong, and exactly as long, or right, but wordy. No held-out "
            f"prompt occurs in training. Files: {folder}"
        )

    @contextlib.contextmanager
    def progress(self, title: str) -> Iterator[StepFunction]:
        """Show a progress bar, and yield the function that moves it."""
        self._heading(title)
        columns = (
            BarColumn(40),
            MofNCompleteColumn(),
            TextColumn("steps, loss {task.fields[loss]:.3f}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as bar:
            task = bar.add_task(title, total=None, loss=float("nan"))

            def on_step(step: int, total: int, loss: float) -> None:
                bar.update(task, completed=step, total=total, loss=loss)

            yield on_step

    def warmed_up(self, num_parameters: int, folder: Path) -> None:
        """Print what the model is after the warm-up."""
        self._note(
            f"A Llama of {num_parameters / 1e6:.2f} million parameters, one token per byte. It has "
            "read right, wrong and wordy answers equally often, so it can answer, and has no "
            f"reason to prefer the right ones. Saved in {folder}"
        )

    def reference(self, done: dict[str, Any], folder: Path) -> None:
        """Print how many answers were found and scored; `done` has the counts of summary.json."""
        self._heading("Reference log-probs")
        self._note(
            f"{done['ref_rows_needed']} answers: {done['ref_store_hits']} found in the store, "
            f"{done['ref_rows_scored']} scored in {done['ref_forward_passes']} forward passes "
            f"({done['ref_seconds']:.1f} s). Training reads them and never runs the reference. "
            f"Store: {folder}"
        )

    def result(
        self, summary: dict[str, Any], samples: Samples, folder: Path, examples: str
    ) -> None:
        """Print accuracies, log-probs and sample answers, before and after.

        Args:
            summary: what summary.json holds.
            samples: answers to show.
            folder: the demo's folder.
            examples: what was trained on, such as pairs.
        """
        self._heading("Held-out pairs, before and after")
        table = Table("", "before", "after", box=None, padding=(0, 2, 0, 2))
        table.columns[1].justify = table.columns[2].justify = "right"
        for title, name in (
            ("chosen rewarded above rejected", "eval_accuracy"),
            ("chosen more probable than rejected", "policy_accuracy"),
            ("  where both are equally long", "policy_accuracy_equal_length"),
            ("answers right to the letter", "exact_answers"),
        ):
            table.add_row(title, *(f"{summary[f'{name}_{when}']:.1%}" for when in _WHEN))
        self.console.print(table)
        expected = summary["first_loss_expected"]
        meaning = "" if expected is None else f" ({expected:.6f} if policy and reference are one)"
        self._note(
            f"Log-prob of chosen answers {summary['chosen_logps_change']:+.2f} nats, of rejected "
            f"ones {summary['rejected_logps_change']:+.2f}. The first loss was "
            f"{summary['first_loss']:.6f}{meaning}. "
            f"{summary['pairs_per_second']:.1f} {examples}/s."
        )
        self._samples(samples)
        self.console.print(
            f"\n{summary['wall_seconds']:.0f} seconds. Everything is in [bold]{folder}[/bold]: "
            f"{SUMMARY_FILE}, {PLOT_FILE}, dpo/ (the trained model), warm/ (the model before)."
        )

    def compared(self, run: dict[str, Any], remaining: int, mean_seconds: float) -> None:
        """Print what has come of a run of a comparison, and how long the remaining ones will take.

        Args:
            run: an entry of `runs` in comparison.json.
            remaining: number of runs to come.
            mean_seconds: mean duration of the runs so far.
        """
        measured = run["measured"]
        if measured is None:
            result = f"Failed: {run['error']}"
        else:
            result = (
                f"Chosen gained more in {measured['eval_accuracy']:.1%} of the held-out pairs, "
                f"{measured['exact_answers']:.1%} of the answers are right."
            )
        self._note(f"{result} ({run['seconds']:.0f} s)")
        if remaining:
            minutes = remaining * mean_seconds / 60
            self._note(f"{remaining} more to come, in about {minutes:.1f} minutes.")

    def comparison(self, content: dict[str, Any], folder: Path) -> None:
        """Print the table of a comparison; `content` is that of comparison.json."""
        self._heading("Losses and betas compared")
        table = Table(*headings(), box=None)
        for column in table.columns[1:]:
            column.justify = "right"
        for column in table.columns[:2]:
            column.no_wrap = True
        for cells in table_rows(content):
            table.add_row(*cells)
        self.console.print(table)
        self._note(LEGEND.format_map(content))
        for sentence in failures(content):
            self._note(sentence)
        self.console.print(
            f"\nEverything is in [bold]{folder}[/bold]: {COMPARISON_FILE}, {TABLE_FILE}, "
            f"{PICTURE_FILE}, runs/ (the reports of each run), warm/ (the model before)."
        )

    def _samples(self, samples: Samples) -> None:
        self._heading(
            f"Most probable answers: {samples.became_right} became right and "
            f"{samples.became_wrong} wrong, for example"
        )
        table = Table("held-out prompt", "before", "after", box=None, padding=(0, 2, 0, 2))
        for sample in samples.shown:
            table.add_row(sample.prompt, sample.before, sample.after)
        self.console.print(table)

    def _heading(self, text: str) -> None:
        self.section += 1
        self.console.print(f"\n[bold]{self.section}. {text}[/bold]")

    def _note(self, text: str) -> None:
        self.console.print(f"   {text}", style="dim", markup=False)  # errors may have brackets


_WHEN = ("before", "after")
