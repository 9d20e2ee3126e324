"""Races the head with each statistic of its rows against the head without: what does one cost?

python -m benchmarks.head --device cpu --statistics all --rounds 9 --json statistics.json
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from benchmarks.harness import TIMED, Contender, Result, clock_for, race
from benchmarks.head_cases import Case, Inputs, make_inputs
from benchmarks.stamps import stamps
from dpofast_kernels import STATISTICS, HeadOptions, backend_for
from dpofast_kernels.head.chunked import ChunkedHead, Wanted

BASE = "none"
ALL = "all"
CHOICES = {BASE: (), **{name: (name,) for name in STATISTICS}, ALL: STATISTICS}


def race_statistics(cases: list[Case], options: argparse.Namespace) -> int:
    """Time forward and backward with each statistic, in turn; print and write ratios to none.

    Returns:
        The exit code: 1 if statistics changed a log-prob.
    """
    torch.set_num_threads(options.threads)
    asked = CHOICES if ALL in options.statistics else options.statistics
    names = list(dict.fromkeys([BASE, *asked]))
    report: dict[str, Any] = {"stamps": stamps("benchmarks.head"), "cases": []}
    is_right = True
    for case in cases:
        inputs = make_inputs(case, options.device)
        expected = scored(inputs, ())
        results, contenders = {}, []
        for name in names:
            results[name] = Result(name, "")
            if not torch.equal(scored(inputs, CHOICES[name]), expected):
                results[name].drop("wrong", "its log-probs differ from those without statistics")
                is_right = False
            contenders.append(_contender(name, inputs))
        race(contenders, results, clock_for(options.device), options.rounds, options.warmup)
        report["cases"].append(_as_dict(case, inputs, results))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if is_right else 1


def scored(inputs: Inputs, statistics: tuple[str, ...]) -> torch.Tensor:
    """[N] per-token log-probs, computed with statistics; forward and backward.

    The coefficients are those of a loss whose derivatives are 1 for every row.
    """
    head = ChunkedHead(
        inputs.hidden_states.detach(),
        inputs.weight.detach(),
        inputs.labels,
        HeadOptions(),
        inputs.weight.dtype,
        backend_for(inputs.weight),
        Wanted(True, True, False),
        statistics,
    )
    gradients = head.new_gradients()
    logps = []
    for rows in head.row_chunks(0, len(inputs.labels)):
        found = head.score(rows)
        logps.append(found.per_token_logps)
        head.add_gradients(gradients, rows, found, torch.ones_like(found.per_token_logps))
    return torch.cat(logps)


def _contender(name: str, inputs: Inputs) -> Contender:
    return Contender(name, lambda: scored(inputs, CHOICES[name]))


def _as_dict(case: Case, inputs: Inputs, results: dict[str, Result]) -> dict[str, Any]:
    base = results[BASE].median
    found: dict[str, Any] = {}
    print(f"{case.name}, {backend_for(inputs.weight)}: forward and backward")
    for name, result in results.items():
        median = result.median
        ratio = median / base if median and base else None
        found[name] = {**result.as_dict(), "over_none": ratio}
        shown = f"{1e3 * median:10.2f} ms" if median else f"{result.status}: {result.reason}"
        print(f"  {name:14}{shown}" + ("" if ratio is None else f"{ratio:8.3f} x {BASE}"))
    assert all(result.status in (TIMED, "wrong") for result in results.values())
    return {"case": case.as_dict(), "statistics": found}
