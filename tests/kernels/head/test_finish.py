"""What the Triton back ends do with sums of exp(z - k): likely, unlikely and broken rows."""

from __future__ import annotations

import pytest
import torch

from dpofast_kernels import make_loss
from dpofast_kernels.head import finish_triton
from tests.kernels.head.cases import (
    FULL_OPTIONS,
    SHORT_LENGTHS,
    assert_close,
    make_inputs,
    options_for,
    relative_error,
    run_logps,
    run_pair_loss,
)

SIGMOID = make_loss("sigmoid", beta=0.3)
BACKENDS = ("triton", "triton_fused")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
def test_rows_computed_again_equal_the_others(full, backend, monkeypatch):
    """With a bound of 0, every row takes the path for labels of vanishing probability."""
    monkeypatch.setattr(finish_triton, "MAX_REST", 0.0)
    inputs = make_inputs(bias=full, lengths=SHORT_LENGTHS)
    options = FULL_OPTIONS if full else {}
    expected = run_pair_loss(inputs, SIGMOID, options_for(inputs, "naive", **options))
    found = run_pair_loss(inputs, SIGMOID, options_for(inputs, backend, **options))
    assert_close(found, expected, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_of_vanishing_probability(backend):
    """exp(z - z_label) overflows fp32 in some rows and passes MAX_REST in others."""
    inputs = make_inputs(torch.float32, spread=1.0, lengths=(3, 7, 4, 6))
    with torch.no_grad():
        inputs.hidden_states[::5] *= 60.0
        inputs.hidden_states[1::5] *= 25.0
    exact = inputs.to(torch.float64)
    truth = run_pair_loss(exact, SIGMOID, options_for(exact, "naive"))
    found = run_pair_loss(inputs, SIGMOID, options_for(inputs, backend))
    gaps = (inputs.hidden_states @ inputs.weight.t()).detach()
    gaps = gaps.amax(-1) - gaps.gather(-1, inputs.labels[:, None])[:, 0]
    assert gaps.max() > 89.0
    assert ((gaps > 67.0) & (gaps < 88.0)).any()
    for name in ("logps", "hidden_states", "weight"):
        assert relative_error(found[name], truth[name]) <= 1e-5, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_label_of_probability_one_keeps_its_digits(backend):
    """1 / p - 1 is summed without the 1, which would leave it no digits."""
    inputs = make_inputs(torch.float32, hidden_size=128, vocab_size=128, lengths=(3, 4))
    with torch.no_grad():
        # With orthogonal weights, a row that points at its label has no other logits.
        inputs.weight.copy_(torch.linalg.qr(torch.randn(128, 128))[0])
        scale = torch.linspace(12.0, 24.0, 7)[:, None]
        inputs.hidden_states.copy_(scale * inputs.weight[inputs.labels])
    exact = inputs.to(torch.float64)
    truth = run_logps(exact, options_for(exact, "naive"))
    assert -1e-3 < truth["logps"].min() < truth["logps"].max() < -1e-9
    found = run_logps(inputs, options_for(inputs, backend))
    assert ((found["logps"] / truth["logps"] - 1.0).abs() <= 1e-4).all()
    for name in ("hidden_states", "weight"):
        assert relative_error(found[name], truth[name]) <= 1e-4, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_nan_changes_no_other(backend):
    inputs = make_inputs(torch.float32, lengths=SHORT_LENGTHS)
    clean = run_pair_loss(inputs, SIGMOID, options_for(inputs, backend))
    inputs.hidden_states.data[0] = float("nan")
    found = run_pair_loss(inputs, SIGMOID, options_for(inputs, backend))
    assert found["logps"][0].isnan()
    assert torch.equal(found["logps"][1:], clean["logps"][1:])
    later = inputs.bounds[2]
    assert torch.equal(found["hidden_states"][later:], clean["hidden_states"][later:])
