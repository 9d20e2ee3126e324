"""Kills the ranks of runs while they save, and resumes them; for test_kill_saves.py.

    python kill_saves.py FOLDER ZERO KILLS SEED [over]
    python kill_saves.py FOLDER ZERO PATTERN...

ZERO is "ddp" or the name of a DeepSpeed configuration. A run is killed in one save after the other,
and resumed each time, until it ends and its losses are compared with those of a run that was never
killed; then the next run begins. With "over", each run begins in the folder of an older one. The
two ranks are forked from this process once it has imported everything, so that a run starts at
once. With patterns, rank 1 dies just before it writes a file of step 3 that matches one, and rank 0
is killed a second later. Prints one JSON object.
"""

from __future__ import annotations

import fnmatch
import json
import os
import random
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401 - before the fork
import torch
from transformers import TrainerCallback

from dpofast.train.checkpoint.resume import newest_whole
from dpofast.train.checkpoint.staging import SAVING
from dpofast.train.reports import reports_run
from tests.distributed.launch import free_port
from tests.support import make_trainer

STEPS, RANKS = 6, 2


class Acknowledges(TrainerCallback):
    """Notes outside the run's folder which checkpoints are saved, as far as the run knows."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.path.write_text(str(state.global_step))


def train(
    folder: Path,
    zero: str,
    *,
    resume: str | None = None,
    seed: int = 3,
    over: bool = False,
    dies_at: str | None = None,
) -> None:
    """One rank's part of a run of six steps, with a checkpoint after each."""
    if dies_at is not None and os.environ["RANK"] == "1":
        torch.save = partial(save_or_die, torch.save, f"*checkpoint-3/{dies_at}")
    options = {
        "deepspeed": None if zero == "ddp" else zero,
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": 1,
        "seed": seed,
        "per_device_train_batch_size": 1,
        "overwrite_output_dir": over,
        "reference_store": str(folder.parent / "store"),
    }
    callbacks = [Acknowledges(folder / "acknowledged")] if os.environ["RANK"] == "0" else []
    trainer = make_trainer(folder, options=options, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    if os.environ["RANK"] == "0":
        logs = [log for log in trainer.state.log_history if "grad_norm" in log]
        losses = [[log["step"], log["loss"], log["grad_norm"]] for log in logs]
        (folder / "losses.json").write_text(json.dumps(losses))


def save_or_die(
    save: Any, pattern: str, content: Any, path: Any, *args: Any, **kwargs: Any
) -> None:
    """torch.save, before which the process kills itself if the path matches a pattern."""
    if fnmatch.fnmatch(str(path), pattern):
        os.kill(os.getpid(), signal.SIGKILL)
    save(content, path, *args, **kwargs)


def start(folder: Path, zero: str, **how: Any) -> list[int]:
    """Fork the ranks of a run; their process ids."""
    port = free_port()
    pids = []
    for rank in range(RANKS):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        code = 1
        try:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS}
            place |= {"LOCAL_WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in place.items()})
            output = os.open(folder / f"output-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            train(folder, zero, **how)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return pids


def wait(pids: list[int], folder: Path) -> None:
    """Wait for a run that isn't killed."""
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [0] * RANKS, (folder / "output-0").read_text()[-3000:]


def saving(folder: Path) -> bool:
    return any(name.startswith(SAVING) for name in os.listdir(folder / "run"))


def kill_while_saving(
    pids: list[int], folder: Path, saves: int, wait_for: float, gap: float
) -> bool:
    """Kill the ranks `wait_for` seconds after the beginning of their save number `saves`.

    Returns:
        Whether they were still running.
    """
    (folder / "run").mkdir(exist_ok=True)
    for number in range(saves):
        while not saving(folder):
            if os.waitid(os.P_PID, pids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT):
                wait(pids, folder)
                return False
            time.sleep(0.0005)
        if number < saves - 1:
            while saving(folder):
                time.sleep(0.0005)
    time.sleep(wait_for)
    os.kill(pids[0], signal.SIGKILL)
    time.sleep(gap)
    os.kill(pids[1], signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return -signal.SIGKILL in codes


def unbroken(folder: Path, zero: str) -> tuple[Any, float]:
    """The losses of a run that isn't killed, and the seconds that one of its saves takes."""
    (folder / "run").mkdir(parents=True)
    pids = start(folder, zero)
    began, spans = None, []
    while not os.waitid(os.P_PID, pids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT):
        is_saving = saving(folder)
        if is_saving and began is None:
            began = time.monotonic()
        elif not is_saving and began is not None:
            spans.append(time.monotonic() - began)
            began = None
        time.sleep(0.0005)
    wait(pids, folder)
    return json.loads((folder / "losses.json").read_text()), sorted(spans)[len(spans) // 2]


def whole_steps(folder: Path) -> list[int]:
    """The steps of the newest whole checkpoints, of those with a name and of those without."""
    run = folder / "run"
    found = [newest_whole(place, None)[0] for place in (run, *run.glob(f"{SAVING}*"))]
    return [int(path.name.split("-")[1]) for path in found if path is not None]


def check_kill(folder: Path, report: dict[str, Any]) -> None:
    """Count what a kill has lost or torn."""
    acknowledged = folder / "acknowledged"
    if acknowledged.exists():
        report["lost"] += int(acknowledged.read_text() or 0) > max(whole_steps(folder), default=0)
    report["torn"] += bool(newest_whole(folder / "run", None)[1])
    report["in_the_area"] += saving(folder)


def rounds(root: Path, zero: str, kills: int, rng: random.Random, over: bool) -> dict[str, Any]:
    names = ("killed", "runs", "lost", "torn", "in_the_area", "wrong")
    report: dict[str, Any] = dict.fromkeys(names, 0)
    expected, span = unbroken(root / "unbroken", zero)
    report["save_seconds"] = span
    if over:
        (root / "older").mkdir()
        wait(start(root / "older", zero, seed=4), root / "older")
    while report["killed"] < kills:
        folder = root / f"run-{report['runs']}"
        folder.mkdir()
        if over:
            shutil.copytree(root / "older" / "run", folder / "run")
        how: dict[str, Any] = {"over": over}
        is_killed = True
        while is_killed:
            pids = start(folder, zero, **how)
            how = {"resume": "auto"}
            if report["killed"] >= kills:
                wait(pids, folder)
                break
            moment, gap = rng.uniform(0, 1.3 * span), rng.choice((0.0, 0.002, 0.02))
            is_killed = kill_while_saving(pids, folder, rng.choice((1, 1, 2)), moment, gap)
            report["killed"] += is_killed
            if is_killed:
                check_kill(folder, report)
        report["runs"] += 1
        got = json.loads((folder / "losses.json").read_text())
        report["wrong"] += got != expected
        shutil.rmtree(folder)
    return report


def deaths(root: Path, zero: str, patterns: list[str]) -> dict[str, Any]:
    """Let rank 1 die before it writes a file, once for each pattern, and resume the run."""
    report: dict[str, Any] = {"died": 0, "steps": [], "wrong": 0}
    expected, _ = unbroken(root / "unbroken", zero)
    for index, pattern in enumerate(patterns):
        folder = root / f"run-{index}"
        folder.mkdir()
        pids = start(folder, zero, dies_at=pattern)
        code = os.waitstatus_to_exitcode(os.waitpid(pids[1], 0)[1])
        report["died"] += code == -signal.SIGKILL
        time.sleep(1.0)
        os.kill(pids[0], signal.SIGKILL)
        os.waitpid(pids[0], 0)
        report["steps"].append(whole_steps(folder))
        wait(start(folder, zero, resume="auto"), folder)
        report["wrong"] += json.loads((folder / "losses.json").read_text()) != expected
    return report


if __name__ == "__main__":
    torch.set_num_threads(1)  # forked processes don't inherit PyTorch's threads
    reports_run.plot_run = lambda *_: None  # a plot takes longer than the run
    target, way, *words = sys.argv[1:]
    if words[0].isdecimal():
        rng = random.Random(int(words[1]))
        found = rounds(Path(target), way, int(words[0]), rng, "over" in words)
    else:
        found = deaths(Path(target), way, words)
    print(json.dumps(found))
