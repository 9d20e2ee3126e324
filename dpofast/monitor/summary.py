"""Memory, versions and hardware of a run, and the JSON files that report them.

Nothing here depends on a trainer: the caller passes the facts about the training.
"""

from __future__ import annotations

import json
import platform
import resource
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

SUMMARY_FILE = "summary.json"
PACKAGES = (
    "dpofast",
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "deepspeed",
    "peft",
    "bitsandbytes",
)


def environment() -> dict[str, Any]:
    """Peak memory of this process, versions and hardware: a part of summary.json."""
    return {
        "peak_memory_bytes": peak_memory_bytes(),
        "versions": versions(),
        "hardware": hardware(),
    }


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide a run's figures; None if missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def hardware() -> dict[str, Any]:
    """Names of the visible GPUs, the machine's type, and the threads that PyTorch uses."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "devices": devices or ["cpu"],
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def peak_memory_bytes() -> dict[str, int]:
    """Peak memory of this process: on the host, and PyTorch's allocations on the current GPU."""
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        peaks["gpu"] = torch.cuda.max_memory_allocated()
    return peaks


def last_evaluation(log_history: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Everything that was logged at the step of the last evaluation; None if there was none.

    With several named sets, each logs at the same step under names of its own.

    Args:
        log_history: one dict per log event, with `step`, as transformers' TrainerState keeps them.
    """
    logs = [log for log in log_history if any(key.startswith("eval_") for key in log)]
    last = [log for log in logs if log["step"] == logs[-1]["step"]]
    return {name: value for log in last for name, value in log.items()} or None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes readable JSON and makes the folders above it; values unknown to JSON become text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
