"""The process of one contender: runs all steps and prints one line of JSON."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import ABSENT, FAILED, AbsentError, one_line
from benchmarks.memory import process_peak_bytes
from benchmarks.train_cases import Work
from benchmarks.train_contenders import ENTRIES, Meter

MODULE = "benchmarks.train_child"


def run(name: str, work: Work) -> dict[str, Any]:
    """Let a contender train all steps; see `measured` for what is returned."""

    def train(meter: Meter) -> dict[str, list[float]]:
        ENTRIES[name].run(work, meter)
        if not len(meter.losses) == len(meter.grad_norms) == 1 + work.num_steps:
            raise RuntimeError(f"reported {len(meter.losses)} losses of {1 + work.num_steps} steps")
        return {"losses": meter.losses, "grad_norms": meter.grad_norms}

    return measured(train, work.device)


def measured(run_it: Callable[[Meter], dict[str, list[float]]], device: str) -> dict[str, Any]:
    """Run a contender and collect its results, seconds, counts and peak bytes.

    On a CPU the peak is the resident set of the process, imports included. On a GPU it is what
    PyTorch allocated while the clock ran.

    Returns:
        The report; {"status": ..., "reason": ...} if the contender is absent or fails.
    """
    meter = Meter(device)
    try:
        results = run_it(meter)
    except (AbsentError, ImportError) as error:
        return {"status": ABSENT, "reason": one_line(error)}
    except Exception as error:  # a peer can raise anything
        return {"status": FAILED, "reason": one_line(error)}
    is_gpu = device == "cuda"
    return {
        "seconds": meter.seconds,
        **results,
        "counts": {"body_tokens": meter.body_tokens, "head_rows": meter.head_rows},
        "peak_bytes": torch.cuda.max_memory_allocated() if is_gpu else process_peak_bytes(),
        "attention": meter.attention,
    }


def serve(
    names: Iterable[str], run_it: Callable[[str, Work], dict[str, Any]], work_type: type[Work]
) -> None:
    """Run the contender that the command line names and print its report as a line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("name", choices=names)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with contextlib.redirect_stdout(sys.stderr):  # keeps trainers' logs out of the report
        work = work_type(given.folder, given.device, given.batch_size, given.steps)
        found = run_it(given.name, work)
    print(json.dumps(found), flush=True)


def main() -> None:
    serve(ENTRIES, run, Work)


if __name__ == "__main__":
    main()
