"""Date, machine, versions and command of a benchmark, for its JSON."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks import REPOSITORY
from dpofast.monitor.summary import hardware, versions

PEERS = ("trl", "liger-kernel", "cut-cross-entropy", "quack-kernels")


def stamps(module: str) -> dict[str, Any]:
    """When and where a benchmark ran, with which versions and which command line."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "git": git_state(REPOSITORY),
        "hardware": {**hardware(), "cpu": _cpu_name(), "cpu_count": os.cpu_count(), **_gpu()},
        "versions": {**versions(), **{name: _version(name) for name in PEERS}},
    }


def git_state(folder: Path) -> dict[str, Any]:
    """The commit that is checked out, and whether files differ from it; None if unknown."""
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain")
    return {"commit": commit or None, "dirty": None if changes is None else bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpu() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties()
    return {
        "gpu_memory_bytes": properties.total_memory,
        "compute_capability": [properties.major, properties.minor],
        "cuda": torch.version.cuda or torch.version.hip,
    }


def _cpu_name() -> str | None:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return None
