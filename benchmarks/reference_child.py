"""One contender of the race of reference log-probs, in a process of its own."""

from __future__ import annotations

from typing import Any

from benchmarks.reference_cases import ReferenceWork
from benchmarks.reference_contenders import ENTRIES
from benchmarks.train_cases import Work
from benchmarks.train_child import measured, serve
from benchmarks.train_contenders import Meter

MODULE = "benchmarks.reference_child"


def run(name: str, work: Work) -> dict[str, Any]:
    """Let a contender score all pairs; see `measured` for what is returned."""

    def score(meter: Meter) -> dict[str, list[float]]:
        return {"logps": ENTRIES[name].run(work, meter).tolist()}

    return measured(score, work.device)


def main() -> None:
    serve(ENTRIES, run, ReferenceWork)


if __name__ == "__main__":
    main()
