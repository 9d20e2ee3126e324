"""What summary.json and benchmark results say about a process, and how they are written."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from dpofast.monitor.summary import environment, last_evaluation, write_json


def test_the_environment_names_memory_versions_and_hardware_in_this_order():
    found = environment()
    assert [*found] == ["peak_memory_bytes", "versions", "hardware"]
    assert found["peak_memory_bytes"]["host"] > 10**7
    assert torch.__version__.startswith(found["versions"]["torch"].split("+")[0])
    assert found["hardware"]["threads"] == torch.get_num_threads()


def test_the_last_evaluation_is_that_of_all_named_sets():
    history = [
        {"step": 1, "eval_a_loss": 0.9},
        {"step": 2, "loss": 0.5},
        {"step": 2, "eval_a_loss": 0.7},
        {"step": 2, "eval_b_loss": 0.8},
        {"step": 2, "train_runtime": 3.0},
    ]
    assert last_evaluation(history) == {"step": 2, "eval_a_loss": 0.7, "eval_b_loss": 0.8}
    assert last_evaluation([{"step": 1, "loss": 0.5}]) is None


def test_json_is_written_into_a_new_folder_and_unknown_values_as_text(tmp_path):
    path = tmp_path / "new" / "summary.json"
    write_json(path, {"path": Path("a"), "count": 2})
    assert json.loads(path.read_text()) == {"path": "a", "count": 2}
