"""Writes jobs for same_ranks.py, runs them, and reads what came out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.distributed.launch import launch

SCRIPT = Path(__file__).with_name("same_ranks.py")


def job(root: Path, name: str, mode: str, way: str, resume: Path | None, **options: Any) -> str:
    """Write a job whose run has a folder of its own, with the store of all jobs beside it."""
    given = {
        "folder": name,
        "mode": mode,
        "way": way,
        "resume": None if resume is None else str(resume),
        "options": {"reference_store": str(root / "store"), **options},
    }
    (root / f"{name}.json").write_text(json.dumps(given))
    return name


def run_jobs(root: Path, ranks: int, names: Sequence[str], timeout: float = 500.0) -> list[Any]:
    """Run jobs in the same processes, one after the other; what each of them found."""
    launch(SCRIPT, ranks, str(root), *names, timeout=timeout)
    return [json.loads((root / f"{name}.found.json").read_text()) for name in names]


def checkpoint(root: Path, name: str, step: int) -> Path:
    return root / name / "run" / f"checkpoint-{step}"
