"""Two ranks that shard a hybrid train it for twenty steps as padded DPO with two models does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.launch import launch
from tests.hybrid_steps import distinct_tokens, hybrid_pairs, padded_history
from tests.real_pairs import assert_is_plain_dpo

SCRIPT = Path(__file__).with_name("hybrid_ranks.py")


@pytest.mark.distributed
def test_two_ranks_train_a_hybrid_as_padded_dpo(tmp_path):
    pairs = hybrid_pairs()
    pairs.save_to_disk(str(tmp_path / "pairs"))
    launch(SCRIPT, 2, str(tmp_path), "zero3", timeout=500.0)
    total = 0
    for rank in range(2):
        counts = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        rows = counts["planned"]
        # Earlier calls belong to the check that runs before step 1.
        assert counts["counted"][-len(rows) :] == rows
        total += sum(rows)
    assert total == distinct_tokens(pairs)
    found = json.loads((tmp_path / "history.json").read_text())
    assert_is_plain_dpo("hybrid, zero3", found, padded_history(pairs))
