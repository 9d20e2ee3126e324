"""A reference has the same identity in one piece and partitioned by ZeRO-3 over two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpofast.reference.identity.model import model_identity
from tests.distributed.launch import launch
from tests.support import tiny_llama

pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).with_name("identity_ranks.py")


def test_two_checkpoints_of_one_architecture_under_zero_3(tmp_path):
    models = {
        "first": tiny_llama(seed=0),
        "second": tiny_llama(seed=1),
        "tied": tiny_llama(seed=0, tie_word_embeddings=True),
    }
    whole = {}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        identity = model_identity(model, autocast_dtype=None, attention="sdpa", head_version=1)
        whole[name] = identity.digest
    assert len(set(whole.values())) == 3
    launch(SCRIPT, 2, str(tmp_path), *(str(tmp_path / name) for name in models))
    for rank in (0, 1):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == whole
