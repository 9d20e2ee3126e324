from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.launch import launch

SCRIPT = Path(__file__).with_name("trust_ranks.py")
WAYS = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")


@pytest.mark.distributed
def test_no_pickle_of_a_checkpoint_runs_code(tmp_path: Path) -> None:
    """Payloads in every pickled file of DeepSpeed's checkpoints; a checkpoint without resumes."""
    launch(SCRIPT, 2, str(tmp_path), *WAYS, timeout=600.0)
    for rank in range(2):
        found = json.loads((tmp_path / f"found-{rank}.json").read_text())
        assert set(found) == set(WAYS)
        for way, errors in found.items():
            for kind in ("optimizer", "model", "scheduler", "random"):
                error = errors[kind]
                assert "posix.mkdir" in error, (way, kind, error)
                assert "/checkpoint-1/" in error, (way, kind, error)
                assert ("trust_checkpoint: true" in error) is (kind in ("optimizer", "model"))
            assert (errors["unread"], errors["trusted"]) == ("", ""), (way, errors)
    markers = [f"{way}-{kind}" for way in WAYS for kind in found[way]]
    assert [name for name in markers if (tmp_path / name).exists()] == []
