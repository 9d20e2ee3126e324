"""Signals to the processes of a run: to a group with data loader workers, and a second one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # each test starts PyTorch

ROOT = Path(__file__).parents[3]
# "blocked" waits in C++ in the second step, as a rank does whose partner has died.
SCRIPT = """
import sys
from pathlib import Path
import torch
from torch.distributed import FileStore
from transformers import TrainerCallback
from tests.support import make_trainer

folder, way = Path(sys.argv[1]), sys.argv[2]

class Tells(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        print("step", state.global_step, flush=True)
        if way == "blocked" and state.global_step == 1:
            FileStore(str(folder / "store of ranks"), 1).get("never set")

options = {"max_steps": 10**6, "dataloader_num_workers": 2 if way == "workers" else 0}
make_trainer(folder, options=options, callbacks=[Tells()]).train()
"""


@contextmanager
def started(folder: Path, way: str) -> Iterator[subprocess.Popen[str]]:
    """A run in a group of its own, in its third step, or blocked in its second one."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), way],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout is not None
            awaited = "step 1" if way == "blocked" else "step 2"
            assert any(line.startswith(awaited) for line in process.stdout), process.stderr
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -2)])
def test_the_workers_of_the_loader_outlive_a_signal_to_the_group(tmp_path, sent, code):
    with started(tmp_path, "workers") as process:
        os.killpg(process.pid, sent)
        _, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert (checkpoint / "trainer_state.json").is_file()
    with pytest.raises(ProcessLookupError):  # no worker is left
        os.killpg(process.pid, 0)


def test_a_second_signal_ends_a_run_that_waits_for_another_rank(tmp_path):
    with started(tmp_path, "blocked") as process:
        time.sleep(0.5)
        process.terminate()
        time.sleep(0.4)
        process.terminate()  # soon enough to be the same signal, passed on by a launcher
        time.sleep(1.2)
        assert process.poll() is None
        process.terminate()
        assert process.wait(timeout=10) == 143
        assert "SIGTERM: the run saves a checkpoint after this step" in process.stderr.read()
    assert not list((tmp_path / "run").glob("checkpoint-*"))
