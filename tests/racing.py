"""What the tests of races have in common: stand-ins for the contenders' processes."""

from __future__ import annotations

from benchmarks.harness import TIMED, Result
from benchmarks.rounds import Standing

# Timed steps of a race of whole steps in a dry run.
STEPS = 2
# What they take; 4 seconds for others.
SECONDS = {"shared": 1.0, "grouped": 1.0, "naive": 8.0}


class Children:
    """Replaces the processes: gives the report of each contender, or why there is none.

    Args:
        changes: replaces parts of a contender's report, or gives the reason why there is none.
    """

    def __init__(self, **changes):
        self.changes, self.calls = changes, []

    def __call__(self, name, batch_size, steps):
        self.calls.append((name, batch_size, steps))
        seconds = SECONDS.get(name, 4.0) * steps / STEPS
        found = {
            "seconds": seconds * (0.5 if batch_size == 1 else 1.0),
            "losses": [0.7] * (1 + steps),
            "grad_norms": [2.0] * (1 + steps),
            "counts": {"body_tokens": 10, "head_rows": 5},
            "peak_bytes": 2.0e9 if name == "naive" else 1.0e9,
            "attention": "sdpa",
        }
        change = self.changes.get(name, {})
        return change if "reason" in change else {**found, **change}


def compare(found, truth, case):
    """Assert that a contender's report has the losses and gradient norms of the truth's."""
    assert "reason" not in found
    standing = Standing(Result("it", ""), num_pairs=1, runs=[found])
    standing.judge(truth, case.tolerances)
    assert standing.result.status == TIMED, standing.result.reason
