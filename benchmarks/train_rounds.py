"""The rounds of the race: contenders in processes of their own, and who of them is right."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import ABSENT, FAILED, TIMED, WRONG, Result, Verdict, ratios, rotated
from benchmarks.memory import measure_in_child
from benchmarks.train_cases import Case, Work
from benchmarks.train_child import MODULE as CHILD_MODULE
from benchmarks.train_contenders import ENTRIES, OURS, TRUTH
from dpofast.data.layout import Layout
from dpofast.data.loader import token_limit
from dpofast.data.plan import BatchShape, StepSampler

Counts = dict[str, int]
# What one process of a contender reports: see `benchmarks.train_child.run`.
Measured = dict[str, Any]
RunChild = Callable[[str, int, int], Measured]  # of a contender, its batch size, timed steps
# Timed steps of a run that looks for the best batch size.
TRIAL_STEPS = 1


@dataclass(eq=False)
class Standing:
    """What was found of one contender.

    Attributes:
        result: its status, and the seconds of each round's timed steps.
        num_pairs: of the timed steps.
        batch_size: pairs in a micro-batch, where tokens don't decide.
        tried: by batch size, pairs a second of one step or a reason, where the best was looked for.
        runs: what its processes reported, one a round.
    """

    result: Result
    num_pairs: int
    batch_size: int | None = None
    tried: dict[int, float | str] = field(default_factory=dict)
    runs: list[Measured] = field(default_factory=list)

    @property
    def speed(self) -> float | None:
        """Pairs a second, the median of the rounds; None unless it was right."""
        median = self.result.median
        return self.num_pairs / median if median else None

    @property
    def peak(self) -> float | None:
        """Bytes, the median of the rounds; None unless it was right."""
        peaks = [run["peak_bytes"] for run in self.runs]
        return statistics.median(peaks) if peaks and self.result.status == TIMED else None

    @property
    def counts(self) -> Counts | None:
        return self.runs[0]["counts"] if self.runs else None

    def judge(self, truth: Measured, bounds: dict[str, float]) -> None:
        """Compare every run's losses and gradient norms with the right ones, step by step."""
        errors = {}
        for name, key in (("loss", "losses"), ("grad_norm", "grad_norms")):
            right = torch.tensor(truth[key], dtype=torch.float64)  # [steps]
            got = torch.tensor([run[key] for run in self.runs], dtype=torch.float64)
            errors[name] = (got / right - 1.0).abs().max().item()  # NaN where any is
        self.result.verdict = Verdict(errors, bounds)
        if self.result.verdict.complaint:
            self.result.drop(WRONG, self.result.verdict.complaint)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
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
        case: that is run.
        run_child: runs a contender at a batch size in a process of its own.
        left_out: by contender, why it takes no part.
    """

    def __init__(self, case: Case, run_child: RunChild, left_out: dict[str, str]) -> None:
        self.case, self.run_child = case, run_child
        num_pairs = case.steps * case.pairs_per_step
        self.standings = {
            name: Standing(Result(name, entry.note), num_pairs) for name, entry in ENTRIES.items()
        }
        for name, reason in left_out.items():
            self.standings[name].result.drop(ABSENT, reason)

    @property
    def running(self) -> list[str]:
        return [name for name, each in self.standings.items() if each.result.status == TIMED]

    def choose_batches(self) -> None:
        """Find the batch size at which each is fastest, in runs that don't count."""
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
                if found.get("status") == ABSENT:
                    break
            if speeds:
                standing.batch_size = max(speeds, key=lambda size: speeds[size])
            else:
                standing.result.drop(found["status"], found["reason"])

    def run_round(self, number: int) -> None:
        """Run everyone who is still in the race once, then judge them."""
        for name in rotated(self.running, number):
            standing = self.standings[name]
            assert standing.batch_size is not None
            found = self.run_child(name, standing.batch_size, self.case.steps)
            if "reason" in found:
                standing.result.drop(found["status"], found["reason"])
                continue
            standing.runs.append(found)
            standing.result.seconds.append(found["seconds"])
        truth = self.standings[TRUTH].runs
        for name in self.running:
            if truth:
                self.standings[name].judge(truth[0], self.case.tolerances)
            else:
                self.standings[name].result.drop(FAILED, f"no losses of {TRUTH} to compare with")

    def ratios(self) -> tuple[dict[str, float | None], dict[str, str]]:
        """Ours over theirs in pairs a second and in bytes at the peak, and why some are None."""
        reasons = {name: each.result.reason for name, each in self.standings.items()}
        found: dict[str, float | None] = {}
        why: dict[str, str] = {}
        for suffix, attribute in (("speed", "speed"), ("memory", "peak")):
            values = {name: getattr(each, attribute) for name, each in self.standings.items()}
            some, some_why = ratios(values, reasons, OURS, suffix)
            found.update(some)
            why.update(some_why)
        return found, why


def planned_counts(work: Work, name: str) -> Counts:
    """Body tokens and head rows of one of our contenders' timed steps, as the plan says."""
    case, pairs = work.case, work.pairs
    layout = Layout(ENTRIES[name].layout or "")
    limit = token_limit(pairs, layout, case.max_tokens)
    shape = BatchShape(work.batch_size, case.pairs_per_step // work.batch_size, 1)
    _, *timed = StepSampler(len(pairs), shape, rank=0, seed=None, limit=limit)
    answers = [len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in pairs]
    body_tokens = head_rows = 0
    for step in timed:
        for batch in step.micro_batches:
            head_rows += sum(answers[pair] for pair in batch)
            if limit is not None:
                body_tokens += sum(limit.lengths[pair] for pair in batch)
            else:
                body_tokens += 2 * len(batch) * max(_longest(pairs[pair]) for pair in batch)
    return {"body_tokens": body_tokens, "head_rows": head_rows}


def _longest(pair: dict[str, list[int]]) -> int:
    return len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))


def child_runner(folder: Path, device: str, threads: int, limit: float) -> RunChild:
    """Runs contenders on the case in `folder`, in new processes of at most `limit` seconds."""

    def run(name: str, batch_size: int, steps: int) -> Measured:
        arguments = [str(folder), name, "--device", device, "--threads", str(threads)]
        arguments += ["--batch-size", str(batch_size), "--steps", str(steps)]
        found, reason = measure_in_child(CHILD_MODULE, arguments, limit)
        if found:
            return found[-1]
        return {"status": FAILED, "reason": reason or "its process said nothing"}

    return run
