"""The tiled PyTorch head: blocks of the vocabulary change nothing."""

from __future__ import annotations

import pytest
import torch

from dpofast_kernels import make_loss
from dpofast_kernels.head import tiled
from tests.kernels.head.cases import (
    FULL_OPTIONS,
    make_inputs,
    options_for,
    relative_error,
    run_logps,
    run_pair_loss,
)

SIGMOID = make_loss("sigmoid", beta=0.1)


@pytest.mark.parametrize("columns", [1, 64, 100, 506, 507])
@pytest.mark.parametrize("run", [run_logps, lambda *a: run_pair_loss(a[0], SIGMOID, a[1])])
@pytest.mark.parametrize("full", [False, True])
def test_blocks_of_the_vocabulary_change_nothing(run, full, columns, monkeypatch):
    inputs = make_inputs(bias=full)
    options = FULL_OPTIONS if full else {}
    expected = run(inputs, options_for(inputs, "naive", **options))
    monkeypatch.setattr(tiled, "PRODUCT_COLUMNS", columns)
    monkeypatch.setattr(tiled, "CPU_CACHE_BYTES", columns * len(inputs.labels) * 8)
    found = run(inputs, options_for(inputs, "torch", **options))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(found[name], value) <= 1e-12, name


def test_a_block_that_a_bias_rules_out(monkeypatch):
    """No row has a finite logit in the first and last blocks."""
    inputs = make_inputs(bias=True)
    with torch.no_grad():
        inputs.bias[:200] = inputs.bias[400:] = float("-inf")
    inputs.bias.requires_grad_(False)
    inputs.labels.clamp_(200, 399)
    monkeypatch.setattr(tiled, "PRODUCT_COLUMNS", 64)
    monkeypatch.setattr(tiled, "CPU_CACHE_BYTES", 64)
    expected = run_pair_loss(inputs, SIGMOID, options_for(inputs, "naive"))
    assert expected["logps"].isfinite().all()
    found = run_pair_loss(inputs, SIGMOID, options_for(inputs, "torch"))
    for name, value in expected.items():
        assert relative_error(found[name], value) <= 1e-12, name


def test_a_capped_label_of_probability_one():
    """There E - S is minus the others' sum, which is lost where it is made from E and S."""
    inputs = make_inputs(torch.float32)
    with torch.no_grad():
        inputs.hidden_states[:] = 30.0 * inputs.weight[inputs.labels]
    exact = inputs.to(torch.float64)
    options = {"softcap": 15.0}
    truth = run_pair_loss(exact, SIGMOID, options_for(exact, "naive", **options))
    found = run_pair_loss(inputs, SIGMOID, options_for(inputs, "torch", **options))
    for name, value in truth.items():
        assert relative_error(found[name], value) <= 1e-4, name
