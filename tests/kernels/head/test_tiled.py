"""The PyTorch back end: its blocks of the vocabulary change nothing."""

from __future__ import annotations

import pytest
import torch

from dpofast_kernels import HeadOptions, linear_logps, make_loss
from dpofast_kernels.head import tiled
from dpofast_kernels.head.workspace import row_chunks
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
    monkeypatch.setattr(tiled, "CPU_COLUMNS", columns)
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
    monkeypatch.setattr(tiled, "CPU_COLUMNS", 64)
    expected = run_pair_loss(inputs, SIGMOID, options_for(inputs, "naive"))
    assert expected["logps"].isfinite().all()
    found = run_pair_loss(inputs, SIGMOID, options_for(inputs, "torch"))
    for name, value in expected.items():
        assert relative_error(found[name], value) <= 1e-12, name


def test_a_capped_label_of_probability_one():
    """There E - S is -R, which would be lost if it were computed from E and S."""
    inputs = make_inputs(torch.float32, hidden_size=507)
    with torch.no_grad():
        # With orthogonal weights, a row that points at its label has no other logits.
        inputs.weight.copy_(torch.linalg.qr(torch.randn(507, 507))[0])
        inputs.hidden_states.copy_(25.0 * inputs.weight[inputs.labels])
    exact = inputs.to(torch.float64)
    options = {"softcap": 40.0}
    label_logps = run_logps(exact, options_for(exact, "naive", **options))["logps"]
    assert -1e-5 < label_logps.min() < label_logps.max() < -1e-8
    truth = run_pair_loss(exact, SIGMOID, options_for(exact, "naive", **options))
    found = run_pair_loss(inputs, SIGMOID, options_for(inputs, "torch", **options))
    for name, value in truth.items():
        assert relative_error(found[name], value) <= 1e-4, name


@pytest.mark.parametrize("columns", [1, 64, 506, 2048])
def test_narrow_gradients_overwrite_the_logits(columns, monkeypatch):
    """A GPU's products take bf16: the same bits as of a cast, and no memory for a second [n, V]."""
    inputs = make_inputs(torch.bfloat16)
    num_rows, vocab_size = len(inputs.labels), len(inputs.weight)
    memory = torch.empty(num_rows * 512)
    coefficients = torch.linspace(-1.0, 1.0, num_rows)
    monkeypatch.setattr(tiled, "CPU_COLUMNS", columns)

    def differentiate(product):
        monkeypatch.setattr(tiled, "product_dtype", lambda weight: product)
        rows = tiled.TorchRows(inputs.weight.detach(), HeadOptions(softcap=30.0))
        workspace = memory.as_strided((num_rows, vocab_size), (512, 1))
        scored = rows.score(inputs.hidden_states.detach(), inputs.labels, workspace, True)
        return rows.differentiate(scored, inputs.labels, coefficients)

    wide = differentiate(torch.float32)
    expected = (wide.d_logits * wide.factors[:, None]).bfloat16()
    narrow = differentiate(torch.bfloat16)
    assert narrow.factors is None
    assert torch.equal(narrow.d_logits, expected)
    assert narrow.d_logits.data_ptr() == memory.data_ptr()


def test_a_row_hardly_depends_on_the_length_of_its_chunk():
    """The reference is scored in other chunks than the policy, which PyTorch's sums depend on."""
    torch.manual_seed(0)
    hidden_states, weight = torch.randn(300, 128), torch.randn(5003, 128)
    labels = torch.randint(0, 5003, (300,))
    whole = linear_logps(hidden_states, weight, labels)
    for size in (256, 200, 100, 33):
        options = HeadOptions(workspace_bytes=4 * 5003 * (size + 15))
        parts = [
            linear_logps(hidden_states[rows], weight, labels[rows], options)
            for rows in row_chunks(0, 300, size)
        ]
        found = torch.cat(parts)
        torch.testing.assert_close(found, whole, rtol=2.0**-22, atol=0)  # two units of 2^-23
        assert (found != whole).float().mean() <= 0.1, size
