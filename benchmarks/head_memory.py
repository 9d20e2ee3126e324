"""Peak memory of forward and backward of the head, each contender in a process of its own."""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import one_line, ratios
from benchmarks.head_cases import Case, Inputs, make_inputs
from benchmarks.head_contenders import contender
from benchmarks.memory import measure_in_child, peak_beyond_baseline

CHILD_SECONDS = 600.0

CaseTargets = tuple[Case, dict[str, Tensor]]


def peaks_in_children(
    module: str, name: str, cases: Sequence[CaseTargets], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Peaks of one contender in every case, or a reason.

    On a GPU one process takes all cases, as the allocator's count can be set back; on a CPU each
    case has its own, as what the C library keeps of one would count in the next.
    """
    if options.device == "cuda":
        return _peaks_in_child(module, name, cases, options)
    return [peaks for case in cases for peaks in _peaks_in_child(module, name, [case], options)]


def child(options: argparse.Namespace) -> None:
    """In the process that `peaks_in_children` starts: measure, and print a JSON line a case."""
    torch.set_num_threads(options.threads)
    for case, targets in torch.load(options.child_file, weights_only=False):
        try:
            inputs = make_inputs(case, options.device, targets)
            peaks = _peaks(options.memory_of, inputs, options.device)
        except Exception as error:  # a peer may raise anything; the next case may do
            peaks = {"reason": one_line(error)}
        print(json.dumps(peaks), flush=True)
        gc.collect()


def memory_ratios(
    memory: dict[str, dict[str, Any]], ours: str
) -> tuple[dict[str, float | None], dict[str, str]]:
    """Ours over theirs, beyond inputs and gradients."""
    peaks = {name: each.get("beyond_inputs_and_gradients") for name, each in memory.items()}
    # A peak that noise makes negative compares with nothing.
    values = {name: peak if peak is not None and peak > 0 else None for name, peak in peaks.items()}
    reasons = {name: each.get("reason") for name, each in memory.items()}
    return ratios(values, reasons, ours, "memory")


def _peaks(name: str, inputs: Inputs, device: str) -> dict[str, Any]:
    """Bytes; a gradient in fp32 that a contender sums in stands in the peak, too."""
    made = contender(name, inputs, "forward_backward")
    if made.run is None:
        return {"reason": made.reason}
    peak = peak_beyond_baseline(made.run, device)
    return {
        "beyond_inputs": peak,
        "beyond_inputs_and_gradients": peak - inputs.gradient_bytes,
        "gradients": inputs.gradient_bytes,
        "fp32_d_weight": 4 * inputs.weight.numel(),
    }


def _peaks_in_child(
    module: str, name: str, cases: Sequence[CaseTargets], options: argparse.Namespace
) -> list[dict[str, Any]]:
    if not cases:
        return []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cases.pt"
        torch.save(list(cases), file)
        arguments = ["--device", options.device, "--threads", str(options.threads)]
        arguments += ["--memory-of", name, "--child-file", str(file)]
        found, reason = measure_in_child(module, arguments, CHILD_SECONDS)
    missing = {"reason": reason or "its process said nothing"}
    return [*found, *[missing] * (len(cases) - len(found))]
