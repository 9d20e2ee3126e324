"""Two ranks export a finished run, and hear together of a folder in use and of a full disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpofast.train.checkpoint.resume import newest_whole
from tests.distributed.launch import launch
from tests.train.small_disk import small_disk

pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).with_name("folder_ranks.py")


def reports(folder, way):
    return [json.loads((folder / f"{way}.{rank}.json").read_text()) for rank in range(2)]


def test_a_finished_run_is_exported_and_a_folder_in_use_is_refused_on_all_ranks(tmp_path):
    ways = ("ddp", "zero2", "zero3")
    launch(SCRIPT, 2, str(tmp_path), "locked", *ways)
    for way in ways:
        expected = {"pairs": [18, 0], "steps": 5, "same run": True}
        assert reports(tmp_path, way) == [expected, expected], way
        run = tmp_path / way / "run"
        exported = load_file(run / "model.safetensors")
        saved = load_file(run / "checkpoint-5" / "model.safetensors")
        assert exported.keys() == saved.keys()
        assert all(torch.equal(exported[name], saved[name]) for name in saved), way
    refusals = reports(tmp_path, "locked")
    assert refusals[0] == refusals[1]
    assert refusals[0]["kind"] == "CheckpointError"
    assert "is in use by another run (process " in refusals[0]["error"]


def test_a_disk_that_fills_up_stops_all_ranks(tmp_path):
    with small_disk(tmp_path / "full" / "run", 4 << 20) as disk:
        launch(SCRIPT, 2, str(tmp_path), "full")
        # A rank that has met the full disk itself says so; another one quotes it.
        kinds = set()
        for report in reports(tmp_path, "full"):
            kinds.add(report["kind"])
            assert "The checkpoint of step 4 can't be written into " in report["error"]
            assert "No space left on device (a save takes about " in report["error"]
            assert "the last whole checkpoint is checkpoint-2: make room" in report["error"]
        assert "CheckpointError" in kinds <= {"CheckpointError", "RankError"}
        assert newest_whole(disk, None)[0] == disk / "checkpoint-2"
