"""Races the losses in the same head: how much longer does another loss take than sigmoid?

python -m benchmarks.head --device cpu --losses all --rounds 9 --json losses.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import TIMED, Contender, Result, clock_for, race
from benchmarks.head_cases import BETA, Case, Inputs, make_inputs
from benchmarks.stamps import stamps
from dpofast_kernels import (
    LOSSES,
    UNPAIRED_LOSSES,
    Answers,
    DivergenceLoss,
    HeadOptions,
    PairLoss,
    PairLossOutput,
    SequenceLossOutput,
    UnpairedLoss,
    backend_for,
    linear_pair_loss,
    linear_sequence_loss,
    make_loss,
    make_mixture,
    make_unpaired_loss,
)

BASE = "sigmoid"
SMOOTHINGS = {"exo_pair": 1e-3}
# Losses that are made from others; PyTorch computes them from the sums of the sequences.
MADE: dict[str, Callable[[], PairLoss]] = {
    "mixture": lambda: make_mixture(["sigmoid", "bco_pair"], [0.8, 0.2], BETA),
    "divergence": lambda: DivergenceLoss(
        beta=BETA, loss=make_loss(BASE, BETA), divergence="js_divergence"
    ),
}
NAMES = (*LOSSES, *UNPAIRED_LOSSES, *MADE)
ALL = "all"
Z = 0.3  # what losses of single answers compare log-ratios with, in nats
Output = PairLossOutput | SequenceLossOutput


def loss_of(name: str) -> PairLoss | UnpairedLoss:
    """The loss of a name in NAMES, at the benchmark's beta."""
    if name in UNPAIRED_LOSSES:
        return make_unpaired_loss(name, BETA)
    return MADE[name]() if name in MADE else make_loss(name, BETA, SMOOTHINGS.get(name, 0.0))


def race_losses(cases: list[Case], options: argparse.Namespace) -> int:
    """Time forward and backward with each loss, in turn; print and write the ratios to sigmoid's.

    Returns:
        The exit code: 1 if the result of a loss was wrong.
    """
    torch.set_num_threads(options.threads)
    names = list(dict.fromkeys([BASE, *(NAMES if ALL in options.losses else options.losses)]))
    report: dict[str, Any] = {"stamps": stamps("benchmarks.head"), "cases": []}
    is_right = True
    for case in cases:
        inputs = make_inputs(case, options.device)
        results, contenders = {}, []
        for name in names:
            contender = _contender(name, inputs)
            assert contender.run is not None
            results[name] = Result(name, "")
            if not _is_right(contender.run(), inputs, loss_of(name)):
                results[name].drop("wrong", "its loss isn't that of its log-probs")
                is_right = False
            contenders.append(contender)
        race(contenders, results, clock_for(options.device), options.rounds, options.warmup)
        report["cases"].append(_as_dict(case, inputs, results))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if is_right else 1


def _contender(name: str, inputs: Inputs) -> Contender:
    loss, options = loss_of(name), HeadOptions()

    def run() -> Output:
        head = (inputs.hidden_states, inputs.weight, inputs.labels)
        output: Output
        if isinstance(loss, UnpairedLoss):
            output = linear_sequence_loss(*head, _answers(inputs), loss, options)
        else:
            output = linear_pair_loss(*head, inputs.bounds, inputs.ref_logps, loss, options)
        torch.autograd.grad(output.loss, [inputs.hidden_states, inputs.weight])
        return output

    return Contender(name, run)


def _answers(inputs: Inputs) -> Answers:
    """The answers of the pairs, each by itself."""
    is_desirable = torch.arange(len(inputs.ref_logps)) % 2 == 0
    z = torch.tensor(Z, dtype=torch.float64)
    return Answers(inputs.bounds, inputs.ref_logps, is_desirable, z)


def _is_right(output: Output, inputs: Inputs, loss: PairLoss | UnpairedLoss) -> bool:
    logratios = output.logps.cpu() - inputs.ref_logps.cpu()
    if isinstance(loss, UnpairedLoss):
        answers = _answers(inputs)
        assert answers.z is not None
        expected = loss.sequence_loss(logratios, answers.is_desirable, answers.z)[0].sum()
    else:
        lengths = inputs.bounds.diff().view(-1, 2)
        expected = loss.pair_loss(logratios[0::2], logratios[1::2], lengths)[0].sum()
    return bool(torch.isclose(output.loss.detach().double().cpu(), expected, rtol=1e-6))


def _as_dict(case: Case, inputs: Inputs, results: dict[str, Result]) -> dict[str, Any]:
    base = results[BASE].median
    found: dict[str, Any] = {}
    print(f"{case.name}, {backend_for(inputs.hidden_states)}: forward and backward")
    for name, result in results.items():
        median = result.median
        ratio = median / base if median and base else None
        found[name] = {**result.as_dict(), "over_sigmoid": ratio}
        shown = f"{1e3 * median:10.2f} ms" if median else f"{result.status}: {result.reason}"
        print(f"  {name:14}{shown}" + ("" if ratio is None else f"{ratio:8.3f} x {BASE}"))
    assert all(result.status in (TIMED, "wrong") for result in results.values())
    return {"case": case.as_dict(), "losses": found}
