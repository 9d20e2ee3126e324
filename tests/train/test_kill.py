"""A run killed with SIGKILL resumes from its last checkpoint as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import sys
import torch
from dpofast import DPOConfig, DPOTrainer
from tests.support import byte_tokenizer, tiny_llama, token_pairs

torch.set_num_threads(1)
folder, resume = sys.argv[1], sys.argv[2] == "resume"
config = DPOConfig(
    output_dir=folder + "/run", reference_store=folder + "/store", per_device_train_batch_size=2,
    beta=0.5, learning_rate=5e-3, optim="adamw_torch", num_train_epochs=8, logging_steps=1,
    save_strategy="steps", save_steps=2, warmup_steps=5, lr_scheduler_type="cosine",
    report_to=[], bf16=False, gradient_checkpointing=False, use_cpu=True, disable_tqdm=True, seed=3,
)
trainer = DPOTrainer(
    tiny_llama(), args=config, train_dataset=token_pairs(10), processing_class=byte_tokenizer()
)
trainer.train(resume_from_checkpoint=resume)
"""

ROOT = Path(__file__).parents[2]


def start(folder: Path, mode: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [sys.executable, "-c", SCRIPT, str(folder), mode]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def losses(folder: Path) -> dict[int, float]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    logs = [json.loads(line) for line in lines]
    steps = [log["step"] for log in logs if "grad_norm" in log]
    assert len(steps) == len(set(steps)), "a step is logged once"
    return {log["step"]: log["loss"] for log in logs if "grad_norm" in log}


@pytest.mark.slow  # starts PyTorch three times
def test_the_remaining_losses_are_those_of_an_unbroken_run(tmp_path):
    unbroken = start(tmp_path / "unbroken", "start")
    assert unbroken.wait(timeout=300) == 0, unbroken.stderr.read()
    expected = losses(tmp_path / "unbroken")
    assert sorted(expected) == list(range(1, 41))

    killed = start(tmp_path / "killed", "start")
    deadline = time.monotonic() + 240
    while not (tmp_path / "killed" / "run" / "checkpoint-6" / "trainer_state.json").is_file():
        assert killed.poll() is None, killed.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait(timeout=60)
    assert not (tmp_path / "killed" / "run" / "summary.json").exists()

    resumed = start(tmp_path / "killed", "resume")
    assert resumed.wait(timeout=300) == 0, resumed.stderr.read()
    assert losses(tmp_path / "killed") == expected
    summary = json.loads((tmp_path / "killed" / "run" / "summary.json").read_text())
    assert summary["ref_forward_passes"] == 0
