"""Two ranks that read a stream train as one that has its rows in a list."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.launch import launch
from tests.support import tiny_llama

pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).with_name("stream_ranks.py")
WAYS = ["ddp.list", "ddp.saved", "ddp.resumed", "zero2.full", "zero3.full"]
ADAPTERS = ["ddp.lora", "zero3.lora"] if importlib.util.find_spec("peft") else []
FAILING = ["ddp.bad", "ddp.split", "ddp.late"]
# After ZeRO-3, models that are loaded by name are sharded in any later way of the process.
ORDER = sorted([*WAYS, *ADAPTERS, *FAILING], key=lambda way: way.partition(".")[0])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    tiny_llama().save_pretrained(folder / "model")
    launch(SCRIPT, 2, str(folder), *ORDER, timeout=600.0)
    return {way: json.loads((folder / f"{way}.json").read_text()) for way in ORDER}


def figures(result, name):
    assert len(result["logs"]) == 8
    return [log[name] for log in result["logs"]]


@pytest.mark.parametrize("way", [way for way in WAYS if way != "ddp.list"])
def test_a_stream_trains_as_a_list(results, way):
    """The second pass begins after a step of one pair, of which one rank has none."""
    for name in ("loss", "grad_norm", "num_tokens", "rewards/margins", "logps/chosen"):
        expected = figures(results["ddp.list"], name)
        np.testing.assert_allclose(figures(results[way], name), expected, rtol=1e-4, atol=1e-6)


def test_a_resumed_run_goes_on_at_the_right_row(results):
    for name in ("loss", "grad_norm", "num_tokens"):
        assert figures(results["ddp.resumed"], name) == figures(results["ddp.saved"], name)


@pytest.mark.skipif(not ADAPTERS, reason="needs the extra `peft`")
def test_an_adapter_is_switched_off_for_rows_that_are_read_later(results):
    for name in ("loss", "grad_norm"):
        expected = figures(results["ddp.lora"], name)
        np.testing.assert_allclose(figures(results["zero3.lora"], name), expected, rtol=1e-4)


def test_all_ranks_stop_if_one_cannot_go_on(results):
    bad, split, late = (results[way]["errors"] for way in FAILING)
    assert bad[0] == bad[1]
    assert "row 13 (counted from 0): chosen_ids is not a list of token ids" in bad[0]
    assert split[0] == split[1]
    assert "the ranks read different pairs" in split[0]
    assert "Rank 1 can't read the stream: train can't be read beyond row 12" in late[0]
    assert "the network is gone" in late[1]
