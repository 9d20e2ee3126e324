"""The files that a training run leaves in its output folder."""

from __future__ import annotations

import json

import pytest

from tests.support import make_trainer


@pytest.mark.usefixtures("real_plots")
def test_a_run_leaves_its_plot_metrics_and_summary(tmp_path):
    make_trainer(tmp_path, options={"max_steps": 2}).train()
    run = tmp_path / "run"
    assert (run / "training.png").read_bytes().startswith(b"\x89PNG")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if "grad_norm" in json.loads(line)]
    assert steps == [1, 2]
    assert json.loads((run / "summary.json").read_text())["global_step"] == 2
