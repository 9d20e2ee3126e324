"""One contender of the race, in a process of its own: runs all steps and prints one JSON line."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import ABSENT, FAILED, AbsentError, one_line
from benchmarks.memory import process_peak_bytes
from benchmarks.train_cases import Work
from benchmarks.train_contenders import ENTRIES, Meter

MODULE = "benchmarks.train_child"


def run(name: str, work: Work) -> dict[str, Any]:
    """What was measured, or {"status": ..., "reason": ...}; seconds and bytes.

    The peak is that of the process on a CPU, imports included; on a GPU that of what PyTorch
    allocated during the timed steps.
    """
    meter = Meter(work.device)
    try:
        ENTRIES[name].run(work, meter)
        if not len(meter.losses) == len(meter.grad_norms) == 1 + work.num_steps:
            raise RuntimeError(f"reported {len(meter.losses)} losses of {1 + work.num_steps} steps")
    except (AbsentError, ImportError) as error:
        return {"status": ABSENT, "reason": one_line(error)}
    except Exception as error:  # a peer may raise anything
        return {"status": FAILED, "reason": one_line(error)}
    is_gpu = work.device == "cuda"
    return {
        "seconds": meter.seconds,
        "losses": meter.losses,
        "grad_norms": meter.grad_norms,
        "counts": {"body_tokens": meter.body_tokens, "head_rows": meter.head_rows},
        "peak_bytes": torch.cuda.max_memory_allocated() if is_gpu else process_peak_bytes(),
        "attention": meter.attention,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("name", choices=ENTRIES)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with contextlib.redirect_stdout(sys.stderr):  # trainers print their logs
        measured = run(given.name, Work(given.folder, given.device, given.batch_size, given.steps))
    print(json.dumps(measured), flush=True)


if __name__ == "__main__":
    main()
