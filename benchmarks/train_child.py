"""One contender of a race, in a process of its own: runs all steps and prints one JSON line."""

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
    """What was measured of training, or why nothing was."""

    def train(meter: Meter) -> dict[str, list[float]]:
        ENTRIES[name].run(work, meter)
        if not len(meter.losses) == len(meter.grad_norms) == 1 + work.num_steps:
            raise RuntimeError(f"reported {len(meter.losses)} losses of {1 + work.num_steps} steps")
        return {"losses": meter.losses, "grad_norms": meter.grad_norms}

    return measured(train, work.device)


def measured(run_it: Callable[[Meter], dict[str, list[float]]], device: str) -> dict[str, Any]:
    """What a contender gave and was metered at, or {"status": ..., "reason": ...}.

    Seconds and bytes. The peak is that of the process on a CPU, imports included; on a GPU that of
    what PyTorch allocated while the time ran.
    """
    meter = Meter(device)
    try:
        results = run_it(meter)
    except (AbsentError, ImportError) as error:
        return {"status": ABSENT, "reason": one_line(error)}
    except Exception as error:  # a peer may raise anything
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
    """Run the contender that the command line names, and print what it gave as a line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("name", choices=names)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with contextlib.redirect_stdout(sys.stderr):  # trainers print their logs
        work = work_type(given.folder, given.device, given.batch_size, given.steps)
        found = run_it(given.name, work)
    print(json.dumps(found), flush=True)


def main() -> None:
    serve(ENTRIES, run, Work)


if __name__ == "__main__":
    main()
