"""Two ranks train on real pairs like textbook DPO for twenty steps, also after a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.launch import launch
from tests.real_pairs import assert_is_plain_dpo

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SCRIPT = Path(__file__).with_name("real_ranks.py")
WAYS = ["ddp", "zero1", "zero2", "zero3"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run every way once, then resume it from its checkpoint in new processes."""
    folder = tmp_path_factory.mktemp("real")
    for phase in ("whole", "resumed"):
        launch(SCRIPT, 2, phase, str(folder), *WAYS, timeout=1500)
    return folder


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("phase", ["whole", "resumed"])
def test_two_ranks_train_as_plain_dpo(runs, plain_history, phase, way):
    got = json.loads((runs / f"{phase}-{way}.json").read_text())
    assert_is_plain_dpo(f"{way}, {phase}", got, plain_history)
