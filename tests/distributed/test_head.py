"""The pair loss inside a model's head: two ranks give the gradients of one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.distributed.head_cases import AUTOCAST_CASES, CASES, FP16_CASES, Case
from tests.distributed.launch import launch

pytestmark = pytest.mark.distributed

# DeepSpeed frees every weight after each use until it has seen a whole micro-batch and knows what
# will be used again.
WARM_UP = 2


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    report = tmp_path_factory.mktemp("head") / "report.json"
    launch(Path(__file__).with_name("head_ranks.py"), 2, str(report))
    return json.loads(report.read_text())


# Under ZeRO-3 and autocast, on a CPU without tiles for bf16, gradients from the head down to the
# last layer's MLP equal those of one process to the last bit. From that layer's attention on, some
# values round to the other bf16 neighbour: 8e-5 of o_proj's gradient, which grows to 4e-3 on the
# way to the embedding. It isn't known which of DeepSpeed's operations differs in its last bits.
NEAR_THE_HEAD = ("lm_head.", "model.norm.", "model.layers.1.mlp.")
AUTOCAST_TOLERANCE = 1e-6 if torch.cpu._is_amx_tile_supported() else 2.0**-7


def need_its_packages(case: Case) -> None:
    if case.adapter is not None:
        pytest.importorskip("peft", reason="needs the extra `peft`")


def wrong(result, tolerance):
    """Gradients whose error exceeds the tolerance, relative to their norm; NaN exceeds any."""
    return {name: error for name, error in result["errors"].items() if not error <= tolerance}


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_give_the_loss_and_gradients_of_one_process(results, name):
    need_its_packages(CASES[name])
    result = results[name]
    assert result["loss_error"] <= 1e-6
    assert result["dtypes"] == ["torch.float32"]
    assert not wrong(result, 1e-6)


@pytest.mark.parametrize("name", [n for n, c in AUTOCAST_CASES.items() if c.sent_in == "fp32"])
def test_autocast_gives_the_gradients_of_one_process_in_fp32(results, name):
    result = results[name]
    assert result["loss_error"] <= 1e-6
    assert result["dtypes"] == ["torch.float32"]
    assert not wrong(result, AUTOCAST_TOLERANCE if name.startswith("zero3") else 1e-6)
    assert not [each for each in wrong(result, 1e-6) if each.startswith(NEAR_THE_HEAD)]


@pytest.mark.parametrize("name", ["ddp_autocast", "zero2_autocast", "zero3_autocast"])
def test_autocast_casts_both_inputs_of_the_head_and_rounds_nothing_else(results, name):
    """Inputs left in fp32, or a gradient through bf16, would be off by 1e-3."""
    assert results[name]["exact_head_error"] <= 1e-5


def test_autocast_takes_a_weight_that_was_gathered_in_bf16(results):
    """DeepSpeed then rounds the gradients of linear layers, too. The embedding's gradient shows
    that the loss was the same."""
    result = results["zero3_autocast_sent_in_bf16"]
    assert result["loss_error"] <= 1e-6
    assert result["errors"]["model.embed_tokens.weight"] <= AUTOCAST_TOLERANCE
    assert not wrong(result, 2.0**-7)


@pytest.mark.parametrize("name", FP16_CASES)
def test_fp16_gradients_that_only_the_loss_scale_lifts_into_range(results, name):
    """Each is far below 2^-24, fp16's smallest number: without the scale it would be 0."""
    result = results[name]
    assert 0.0 < result["largest"] < 2.0**-25
    assert result["loss_error"] <= 1e-2
    assert not wrong(result, 1e-2)


def gathers(results, setting, weight):
    counts = [counted.get(weight, 0) for counted in results["gathers"][setting][WARM_UP:]]
    assert len(counts) >= 3
    return set(counts)


@pytest.mark.parametrize(
    ("setting", "weight"),
    [("default", "lm_head.weight"), ("tied", "model.embed_tokens.weight")],
)
def test_zero3_gathers_the_head_once_a_micro_batch(results, setting, weight):
    """Count its all-gathers in a forward and backward, at the default reuse distance."""
    assert gathers(results, setting, weight) == {1}


def test_zero3_gathers_the_head_once_if_only_what_is_used_next_is_kept(results):
    """A reuse distance of one element does to this model what the default does to a large one: the
    layers are gathered again for the backward, which begins with the head."""
    assert gathers(results, "next", "model.layers.0.mlp.down_proj.weight") == {2}
    assert gathers(results, "next", "lm_head.weight") == {1}


def test_zero3_gathers_the_head_twice_if_nothing_is_kept(results):
    """Shows that the counts above can tell one gather from two."""
    assert gathers(results, "none", "lm_head.weight") == {2}
