"""Two ranks train on real pairs like textbook DPO for twenty steps, also after a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.launch import launch
from tests.real_pairs import assert_is_plain_dpo

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SCRIPT = Path(__file__).with_name("real_ranks.py")
# test_two_ranks.py compares all stages, with a smaller model.
WAYS = [
    "ddp",
    "zero3",
    pytest.param("zero1", marks=pytest.mark.torture),
    pytest.param("zero2", marks=pytest.mark.torture),
]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_train_as_plain_dpo(tmp_path, plain_history, way):
    """The run, and the end of it again in new processes, from the checkpoint in its middle."""
    for phase in ("whole", "resumed"):
        launch(SCRIPT, 2, phase, str(tmp_path), way, timeout=1500)
        got = json.loads((tmp_path / f"{phase}-{way}.json").read_text())
        assert_is_plain_dpo(f"{way}, {phase}", got, plain_history)
