"""Runs stages one after the other; whatever becomes of one, the others run and leave their JSON."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import REPOSITORY
from benchmarks.gpu.stages import Stage

SHOWN_LINES = 25  # of a stage's log


def run_stages(
    stages: Sequence[Stage], folder: Path, environment: dict[str, str], summary: dict[str, Any]
) -> bool:
    """Run all stages of a part.

    Args:
        stages: the stages.
        folder: where each leaves NAME.json and NAME.log.
        environment: added to the environment of the processes.
        summary: what is known about the run. The outcome of each stage is added under "stages".

    Returns:
        Whether all of them ended well.
    """
    left = 0.0  # seconds that earlier stages didn't need
    for stage in stages:
        limit = stage.seconds + left
        print(f"== {stage.name}, at most {limit:.0f} s", flush=True)
        outcome = run_stage(stage, folder, environment, limit)
        left = max(0.0, limit - outcome["seconds"])
        summary["stages"][stage.name] = outcome
        write_whole(folder / f"{summary['part']}.json", summary)
        print(_end_of(folder / outcome["log"]))
        reason = f": {outcome['reason']}" if outcome["reason"] else ""
        print(f"-- {stage.name} {outcome['status']} in {outcome['seconds']:.0f} s{reason}")
    return all(each["status"] == "done" for each in summary["stages"].values())


def run_stage(
    stage: Stage, folder: Path, environment: dict[str, str], limit: float
) -> dict[str, Any]:
    """Run one stage; end it and all its processes after `limit` seconds.

    Returns:
        Its outcome: "done", "failed" or "out of time", with the reason.
    """
    result, log = folder / f"{stage.name}.json", folder / f"{stage.name}.log"
    result.unlink(missing_ok=True)  # of an earlier run
    command = [sys.executable, "-m", stage.module, *stage.arguments, "--json", str(result)]
    started, reason = time.monotonic(), None
    with log.open("wb") as output:
        child = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = child.wait(timeout=limit)
            status = "done" if code == 0 else "failed"
            if code:
                reason = f"exit code {code}"
                if code < 0:
                    reason = f"ended by {signal.Signals(-code).name}"
        except subprocess.TimeoutExpired:
            status, code, reason = "out of time", None, f"took longer than {limit:.0f} s"
        finally:
            _end_group(child)
    outcome = {
        "status": status,
        "reason": reason,
        "exit_code": code,
        "seconds": time.monotonic() - started,
        "limit": limit,
        "command": command[1:],
        "json": result.name,
        "log": log.name,
    }
    if not _is_json(result):
        # The stage has written nothing, or was ended while it wrote.
        write_whole(result, {"stage": stage.name, **outcome})
    return outcome


def write_whole(path: Path, content: dict[str, Any]) -> None:
    """Write JSON so that a process that is ended leaves the old file or the new one."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    unfinished.replace(path)


def _end_group(child: subprocess.Popen[bytes]) -> None:
    """End a stage's processes: it has started some of its own, which must not outlive it."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # all of them have ended
    child.wait()


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _end_of(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-SHOWN_LINES:])
