"""Adapters on quantised models train on two ranks as on one, and have the same reference."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.launch import launch
from tests.support import tiny_llama

pytest.importorskip("bitsandbytes", reason="needs the extra `bitsandbytes`")
pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).with_name("quantised_ranks.py")
WAYS = ["ddp.4", "zero2.4", "ddp.8", "zero2.8"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised")
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(folder / "model")
    launch(SCRIPT, 2, str(folder), *WAYS, "zero3.4", timeout=600.0)
    return {way: json.loads((folder / f"{way}.json").read_text()) for way in [*WAYS, "zero3.4"]}


@pytest.mark.parametrize("bits", [4, 8])
def test_zero2_trains_as_plain_data_parallelism(results, bits):
    plain, sharded = results[f"ddp.{bits}"], results[f"zero2.{bits}"]
    assert plain["digest"] == sharded["digest"]
    np.testing.assert_allclose(sharded["history"], plain["history"], rtol=1e-5)
    assert sharded["later"] == pytest.approx(plain["later"], rel=1e-5)
    assert plain["history"][-1][0] < 0.69


def test_the_two_ways_of_quantising_are_two_references(results):
    assert results["ddp.4"]["digest"] != results["ddp.8"]["digest"]


def test_zero3_is_refused_with_what_to_set(results):
    assert "use zero2" in results["zero3.4"]["error"]
