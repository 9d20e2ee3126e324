"""The rounds of a race: runs contenders in processes of their own and judges their results."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import ABSENT, FAILED, TIMED, WRONG, Result, Verdict, ratios, rotated
from benchmarks.memory import measure_in_child
from benchmarks.train_cases import Case
from benchmarks.train_contenders import Entry

Counts = dict[str, int]
# Report of a contender's process, see `benchmarks.train_child.measured`.
Measured = dict[str, Any]
RunChild = Callable[[str, int, int], Measured]  # takes contender, batch size, timed steps
# Timed steps of a run that tries a batch size.
TRIAL_STEPS = 1
# Maps the name of a judged value to its key in a process' report.
REPORTED_AS = {"loss": "losses", "grad_norm": "grad_norms", "logps": "logps"}


@dataclass(frozen=True)
class Contest:
    """The contenders of a race.

    Attributes:
        entries: all contenders.
        ours: the contender that the others are compared with.
        truth: the contender whose results are right by definition.
        child: module that runs one contender in its process.
    """

    entries: dict[str, Entry]
    ours: str
    truth: str
    child: str

    def left_out(self, options: argparse.Namespace) -> dict[str, str]:
        """Contenders that take no part, with the reason. Ours and the truth always take part."""
        found = {}
        for name, entry in self.entries.items():
            if name in (self.ours, self.truth):
                continue
            if name in options.skip or (options.contenders and name not in options.contenders):
                found[name] = "left out by the command line"
            elif options.device not in entry.on and name not in options.contenders:
                found[name] = f"left out on {options.device} unless asked for: --contenders {name}"
        return found


@dataclass(eq=False)
class Standing:
    """What the race knows about one contender so far.

    Attributes:
        result: status, and for each round the seconds of its timed steps.
        num_pairs: pairs in the timed steps.
        batch_size: pairs in a micro-batch; packed contenders split a step by tokens instead.
        tried: for each batch size that was tried, its pairs per second or why it failed.
        runs: reports of its processes, one per round.
    """

    result: Result
    num_pairs: int
    batch_size: int | None = None
    tried: dict[int, float | str] = field(default_factory=dict)
    runs: list[Measured] = field(default_factory=list)

    @property
    def speed(self) -> float | None:
        """Pairs per second, the median of the rounds; None unless its results were right."""
        median = self.result.median
        return self.num_pairs / median if median else None

    @property
    def peak(self) -> float | None:
        """Peak bytes, the median of the rounds; None unless its results were right."""
        peaks = [run["peak_bytes"] for run in self.runs]
        return statistics.median(peaks) if peaks and self.result.status == TIMED else None

    @property
    def counts(self) -> Counts | None:
        return self.runs[0]["counts"] if self.runs else None

    def judge(self, truth: Measured, bounds: dict[str, float]) -> None:
        """Compare the results of every run with the right ones."""
        errors = {}
        for name in bounds:
            key = REPORTED_AS[name]
            right = torch.tensor(truth[key], dtype=torch.float64)  # [n]
            got = torch.tensor([run[key] for run in self.runs], dtype=torch.float64)
            errors[name] = (got / right - 1.0).abs().max().item()  # NaN if any is NaN
        self.result.verdict = Verdict(errors, bounds)
        if self.result.verdict.complaint:
            self.result.drop(WRONG, self.result.verdict.complaint)

    def as_dict(self) -> dict[str, Any]:
        """The standing as it is written to JSON."""
        return {
            **self.result.as_dict(),
            "pairs_per_second": self.speed,
            "peak_bytes": self.peak,
            "batch_size": self.batch_size,
            "tried": self.tried,
            "attention": self.runs[0]["attention"] if self.runs else None,
            "runs": self.runs,
        }


class Race:
    """All contenders of a case.

    Args:
        contest: the contenders.
        case: model, pairs and steps.
        run_child: function that runs a contender in a process of its own.
        left_out: contenders that take no part, with the reason.
    """

    def __init__(
        self, contest: Contest, case: Case, run_child: RunChild, left_out: dict[str, str]
    ) -> None:
        self.contest, self.case, self.run_child = contest, case, run_child
        num_pairs = case.steps * case.pairs_per_step
        self.standings = {
            name: Standing(Result(name, entry.note), num_pairs)
            for name, entry in contest.entries.items()
        }
        for name, reason in left_out.items():
            self.standings[name].result.drop(ABSENT, reason)

    @property
    def running(self) -> list[str]:
        """Contenders that are still in the race."""
        return [name for name, each in self.standings.items() if each.result.status == TIMED]

    def choose_batches(self) -> None:
        """Find each contender's fastest batch size, in runs that don't count."""
        for name in self.running:
            standing, sizes = self.standings[name], self.case.batches_of(name)
            standing.batch_size = sizes[0]
            if len(sizes) == 1:
                continue
            speeds = {}
            for size in sizes:
                found = self.run_child(name, size, TRIAL_STEPS)
                if "reason" not in found:
                    speeds[size] = TRIAL_STEPS * self.case.pairs_per_step / found["seconds"]
                standing.tried[size] = speeds.get(size) or found["reason"]
                # It won't run at another size, either.
                if found.get("status") == ABSENT:
                    break
            if speeds:
                standing.batch_size = max(speeds, key=lambda size: speeds[size])
            else:
                standing.result.drop(found["status"], found["reason"])

    def run_round(self, number: int) -> None:
        """Run all contenders that are still in the race once, then judge them."""
        for name in rotated(self.running, number):
            standing = self.standings[name]
            assert standing.batch_size is not None
            found = self.run_child(name, standing.batch_size, self.case.steps)
            if "reason" in found:
                standing.result.drop(found["status"], found["reason"])
                continue
            standing.runs.append(found)
            standing.result.seconds.append(found["seconds"])
        # The truth's first run is the standard for all contenders, and for the truth's later runs.
        truth = self.standings[self.contest.truth].runs
        for name in self.running:
            if truth:
                self.standings[name].judge(truth[0], self.case.tolerances)
            else:
                reason = f"no results of {self.contest.truth} to compare with"
                self.standings[name].result.drop(FAILED, reason)

    def ratios(self) -> tuple[dict[str, float | None], dict[str, str]]:
        """Ours over theirs, for pairs per second and peak bytes, and why some are None."""
        reasons = {name: each.result.reason for name, each in self.standings.items()}
        found: dict[str, float | None] = {}
        why: dict[str, str] = {}
        for suffix, attribute in (("speed", "speed"), ("memory", "peak")):
            values = {name: getattr(each, attribute) for name, each in self.standings.items()}
            some, some_why = ratios(values, reasons, self.contest.ours, suffix)
            found.update(some)
            why.update(some_why)
        return found, why

    def miscounts(self, planned: dict[str, Counts]) -> list[str]:
        """One line for each of our runs whose counts differ from the plan."""
        return [
            f"{name} ran {run['counts']}, planned were {planned[name]}"
            for name in planned
            for run in self.standings[name].runs
            if run["counts"] != planned[name]
        ]

    def is_good(self, planned: dict[str, Counts]) -> bool:
        """Whether ours was right, was timed, and ran the planned tokens."""
        is_timed = self.standings[self.contest.ours].result.status == TIMED
        return is_timed and not self.miscounts(planned)


def child_runner(
    contest: Contest, folder: Path, device: str, threads: int, limit: float
) -> RunChild:
    """A function that runs contenders on the case in `folder`, for at most `limit` seconds each."""

    def run(name: str, batch_size: int, steps: int) -> Measured:
        arguments = [str(folder), name, "--device", device, "--threads", str(threads)]
        arguments += ["--batch-size", str(batch_size), "--steps", str(steps)]
        found, reason = measure_in_child(contest.child, arguments, limit)
        if found:
            return found[-1]
        return {"status": FAILED, "reason": reason or "its process said nothing"}

    return run
