"""Rates and lengths of training steps, between two logs and over a run."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import torch

from dpofast.data.packing.collate import Layout
from dpofast.model.flops import TrainingFlops
from dpofast.monitor import throughput as module
from dpofast.monitor.throughput import Throughput
from tests.support import make_trainer, tiny_llama, token_pairs

PAIR = [([5, 6, 7], [8, 9]), ([5, 6, 7], [10, 11, 12, 13])]


def test_an_answer_counts_in_each_of_its_pairs():
    """Whether the model runs it once or not, and whether the prompt is scored as well or not."""
    (one, other), last = PAIR, ([5, 6, 7], [14])
    apart = Layout("shared").collate([one, other, one, last])
    once = Layout("shared").collate([one, other, last], group_sizes=[3], counts=[2, 1, 1])
    once = replace(once, pairs=torch.tensor([[0, 1], [0, 2]]))
    scored = Layout("shared").collate([one, other, one, last], scored_prompts=[0, 2])
    for batch in (apart, once, scored):
        counts = Throughput(tiny_llama(), torch.float32, torch.device("cpu"), world_size=1)
        counts.start_step()
        counts.add(batch)
        found = counts.metrics(lambda own: own)
        assert found["lengths/pair"] == (5 + 7 + 5 + 4) / 2
        assert found["lengths/scored"] == (2 + 4 + 2 + 1) / 2


def test_figures_of_two_ranks_since_the_last_log(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(module, "peak_flops", lambda *_: 1e6)
    model, batch = tiny_llama(), Layout("shared").collate(PAIR)
    counts = Throughput(model, torch.bfloat16, torch.device("cpu"), world_size=2)
    assert counts.metrics(lambda own: own) == {}
    counts.start_step()
    counts.add(batch)
    now[0] = 102.0
    counts.start_step()
    counts.add(batch)
    now[0] = 104.0
    found = counts.metrics(lambda own: 2 * own)
    work = 4 * TrainingFlops(model).of(batch)
    assert found == {
        "pairs_per_second": 1.0,
        "tokens_per_second": 4 * 12 / 4,
        "mfu": pytest.approx(work / 4 / 2 / 1e6),
        "lengths/pair": 12.0,
        "lengths/scored": 6.0,
        "lengths/row": 9.0,
    }
    now[0] = 150.0  # an evaluation has run, which doesn't count
    counts.start_step()
    counts.add(batch)
    now[0] = 152.0
    assert counts.metrics(lambda own: own)["pairs_per_second"] == 0.5
    assert counts.summary()["pairs_per_second"] == 5 / 6


def test_a_run_logs_them_and_sums_them_up(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=token_pairs(4, seed=4))
    trainer.train()
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    columns = ("prompt_ids", "prompt_ids", "chosen_ids", "rejected_ids")
    pairs = trainer.train_dataset
    lengths = [sum(len(pair[name]) for name in columns) for pair in pairs]
    epoch, pairs_per_step = logs[:3], (4, 4, 2)
    logged = (n * log["lengths/pair"] for n, log in zip(pairs_per_step, epoch, strict=True))
    assert sum(logged) == pytest.approx(sum(lengths))
    assert all(log["pairs_per_second"] > 0 and "mfu" not in log for log in logs)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["layout"] == "shared"
    assert summary["packing"]["max_tokens"] == 2048
    assert 0 < summary["packing"]["tokens_saved"] < 0.5
    assert summary["throughput"]["tokens_per_second"] > 0
