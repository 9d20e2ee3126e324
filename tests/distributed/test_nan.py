"""A NaN or an infinity on one rank or all of them ends the run on all, and reaches no file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.launch import launch
from tests.nan_ways import WAYS, assert_clean
from tests.support import tiny_llama

pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).with_name("nan_ranks.py")


@pytest.mark.parametrize("deepspeed", ["", "zero2", "zero3"])
def test_a_nan_is_caught_within_its_step_on_all_ranks(tmp_path, deepspeed):
    tiny_llama().save_pretrained(tmp_path / "model")
    launch(SCRIPT, 2, str(tmp_path), *filter(None, [deepspeed]))
    found = json.loads((tmp_path / "found.json").read_text())
    for number, (way, expected) in enumerate(WAYS.items()):
        assert len({tuple(each) for each in found[way]}) == 1, f"{way}: the ranks differ"
        kind, exit_code, message = found[way][0]
        assert (kind, exit_code) == (expected.error.__name__, expected.exit_code), (way, message)
        assert expected.names in message, (way, message)
        assert_clean(tmp_path / f"way{number}" / "run", expected.last)
