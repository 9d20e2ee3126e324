"""The whole demo."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from dpofast.demo.run import run_demo


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_demo_learns_what_it_is_shown(tmp_path: Path) -> None:
    run_demo(tmp_path, seed=1)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["first_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert summary["eval_accuracy_before"] == 0
    assert summary["eval_accuracy_after"] >= 0.9
    before = summary["policy_accuracy_equal_length_before"]
    assert summary["policy_accuracy_equal_length_after"] >= before + 0.2
    assert summary["policy_accuracy_after"] > summary["policy_accuracy_before"]
    assert summary["rejected_logps_change"] < summary["chosen_logps_change"]
    assert summary["ref_rows_scored"] == summary["ref_store_hits"] > 0
    assert summary["ref_forward_passes"] > 0
    assert summary["pairs_per_second"] > 0
    for name in (
        "training.png",
        "dpo/model.safetensors",
        "dpo/README.md",
        "data/train.jsonl",
        "reference",
    ):
        assert (tmp_path / name).exists()
