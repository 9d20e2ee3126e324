"""Signals end runs under launchers with a checkpoint, from which the same command goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from dpofast.demo.model import make_tokenizer
from tests.distributed.launch import ROOT, free_port, launch, torchrun
from tests.support import tiny_llama

pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).with_name("signal_ranks.py")
# What the recipe of docs/checkpoints.md does: srun starts a process for each rank, and its exit
# code is the highest of theirs. SLURM sends signals to each of the processes.
SRUN = """
for rank in 0 1; do
  SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=2 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
    export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec "$0" "$@"' "$@" &
  echo "$!" >> "$PIDS"
done
code=0
for pid in $(cat "$PIDS"); do wait "$pid"; own=$?; [ $own -gt $code ] && code=$own; done
exit $code
"""


@pytest.mark.timeout(900)
def test_the_ranks_stop_together_and_resume_exactly(tmp_path):
    launch(SCRIPT, 2, str(tmp_path), "ddp", "zero2", "zero3", timeout=800.0)


@pytest.fixture
def run_file(tmp_path):
    """A YAML file of a run that would take minutes."""
    tokenizer = make_tokenizer()
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    pairs = [{"prompt": "Say it.", "chosen": f"{n}", "rejected": f"{n}, no"} for n in range(8)]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    options = {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset_name": str(tmp_path / "pairs.json"),
        "output_dir": str(tmp_path / "run"),
        "reference_store": str(tmp_path / "store"),
        "resume_from_checkpoint": "auto",
        "max_steps": 100_000,
        "per_device_train_batch_size": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    return tmp_path / "run.yaml"


@contextmanager
def started(command: list[str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a command, and go on once its run logs steps that weren't there before."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PIDS": str(folder / "pids"),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    (folder / "pids").unlink(missing_ok=True)
    logs, before = folder / "run" / "metrics.jsonl", last_step(folder)
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            deadline = time.monotonic() + 200
            while not logs.is_file() or last_step(folder) <= before + 1:
                assert process.poll() is None, process.communicate()[1][-4000:]
                assert time.monotonic() < deadline
                time.sleep(0.1)
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def last_step(folder: Path) -> int:
    logs = folder / "run" / "metrics.jsonl"
    lines = logs.read_text().splitlines() if logs.is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def check_stopped(folder: Path) -> int:
    """The step of the newest checkpoint, which is the last one that was logged."""
    run = folder / "run"
    names = {path.name for path in run.iterdir()}
    assert not {"summary.json", "model.safetensors"} & names
    steps = [int(name.split("-")[1]) for name in names if name.startswith("checkpoint-")]
    assert max(steps) == last_step(folder)
    logged = [json.loads(line)["step"] for line in (run / "metrics.jsonl").open()]
    assert logged == list(range(1, max(steps) + 1)), "each step is logged once"
    return max(steps)


def test_torchrun_and_srun_end_with_a_checkpoint_and_go_on_from_it(tmp_path, run_file):
    words = ["-m", "dpofast", "train", str(run_file)]
    # torchrun passes SIGTERM on to its ranks, and has an exit code of its own.
    with started([*torchrun(2), *words], tmp_path) as process:
        process.terminate()
        error = process.communicate(timeout=120)[1]
        assert process.returncode == 1, error[-4000:]
        assert "SIGTERM: the run ends after step" in error
    first = check_stopped(tmp_path)
    # SLURM signals the tasks; here a single one of them.
    command = ["bash", "-c", SRUN, "srun", sys.executable, *words]
    with started(command, tmp_path) as process:
        second_rank = int((tmp_path / "pids").read_text().split()[1])
        os.kill(second_rank, signal.SIGUSR1)
        error = process.communicate(timeout=120)[1]
        assert process.returncode == 138, error[-4000:]
    assert check_stopped(tmp_path) > first
