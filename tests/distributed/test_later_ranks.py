"""Datasets that come after training began are scored with the same reference on two ranks."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.later_ranks import AFTER, DURING
from tests.distributed.launch import launch
from tests.support import make_trainer, tiny_llama

pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).with_name("later_ranks.py")
WAYS = ["ddp.full", "ddp.lora", "ddp.dora", "zero2.dora", "zero3.full", "zero3.lora"]
if importlib.util.find_spec("peft") is None:
    WAYS = [way for way in WAYS if way.endswith("full")]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("later")
    tiny_llama().save_pretrained(folder / "model")
    launch(SCRIPT, 2, str(folder), *WAYS, "zero3.dora", timeout=600.0)
    return {way: json.loads((folder / f"{way}.json").read_text()) for way in [*WAYS, "zero3.dora"]}


@pytest.mark.parametrize("way", WAYS)
def test_later_datasets_get_the_reference_of_the_start(tmp_path, results, way):
    trainer = make_trainer(tmp_path, eval_dataset={"a": DURING, "b": AFTER})
    trainer.score_datasets()
    expected = {len(each): each.ref_logps for each in trainer.data.datasets}
    for name, pairs in (("eval", DURING), ("eval_2", AFTER)):
        np.testing.assert_allclose(results[way][name], expected[len(pairs)], rtol=1e-6)
    assert abs(results[way]["moved"]) > 1e-3
    # The steps after the scoring are those of plain data parallelism.
    plain = results[f"ddp.{way.partition('.')[2]}"]["losses"]
    np.testing.assert_allclose(results[way]["losses"], plain, rtol=1e-4)


def test_sharded_weights_of_other_adapters_are_refused_with_the_reason(results):
    assert "its adapter belongs to the reference" in results["zero3.dora"]["error"]
