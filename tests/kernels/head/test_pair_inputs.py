"""linear_pair_loss on inputs that are extreme, not contiguous, or ruled out by a bias."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dpofast_kernels import (
    linear_logps,
)
from tests.kernels.head.cases import (
    BACKENDS,
    SHORT_LENGTHS,
    SIGMOID,
    assert_close,
    make_inputs,
    options_for,
    relative_error,
    run_pair_loss,
)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_logits_stay_finite_and_exact(backend):
    inputs = make_inputs(torch.float32, spread=3000.0, lengths=SHORT_LENGTHS)
    exact = inputs.to(torch.float64)
    truth = run_pair_loss(exact, SIGMOID, options_for(exact, "naive"))
    actual = run_pair_loss(inputs, SIGMOID, options_for(inputs, backend))
    for name, value in truth.items():
        assert actual[name].isfinite().all(), name
        assert relative_error(actual[name], value) <= 1e-3, name


def test_inputs_that_are_not_contiguous():
    inputs = make_inputs()
    expected = run_pair_loss(inputs, SIGMOID, options_for(inputs, "naive"))
    strided = replace(
        inputs,
        hidden_states=inputs.hidden_states.detach().t().contiguous().t().requires_grad_(),
        weight=inputs.weight.detach().t().contiguous().t().requires_grad_(),
        labels=inputs.labels.repeat_interleave(2)[::2],
    )
    for backend in ("torch", "triton"):
        found = run_pair_loss(strided, SIGMOID, options_for(strided, backend))
        assert_close(found, expected, 1e-12)
    with pytest.raises(ValueError, match=r"weight has strides \(1, 507\).*'triton_fused' expects"):
        run_pair_loss(strided, SIGMOID, options_for(strided, "triton_fused"))
    strided = replace(strided, weight=inputs.weight)
    found = run_pair_loss(strided, SIGMOID, options_for(strided, "triton_fused"))
    assert_close(found, expected, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_that_are_slices_of_larger_ones(backend):
    """Unaligned rows with gaps between them, and every other number of the vectors."""
    inputs = make_inputs(bias=True, hidden_size=16, vocab_size=130, lengths=(3, 4))
    expected = run_pair_loss(inputs, SIGMOID, options_for(inputs, "naive"))

    def spread(tensor, *places):
        larger = tensor.new_full([2 * size + 10 for size in tensor.shape], 77)
        larger[places] = tensor.detach()
        return larger[places].requires_grad_(tensor.requires_grad)

    sliced = replace(
        inputs,
        hidden_states=spread(inputs.hidden_states, slice(7), slice(3, 19)),
        weight=spread(inputs.weight, slice(130), slice(7, 23)),
        bias=spread(inputs.bias, slice(0, 260, 2)),
        labels=spread(inputs.labels, slice(0, 14, 2)),
        bounds=spread(inputs.bounds, slice(0, 6, 2)),
        ref_logps=spread(inputs.ref_logps, slice(0, 4, 2)),
    )
    assert not sliced.weight.is_contiguous()
    assert sliced.ref_logps.stride() == (2,)
    assert_close(run_pair_loss(sliced, SIGMOID, options_for(sliced, backend)), expected, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_label_that_a_bias_rules_out(backend):
    """Its log-prob is -inf; the other rows and all gradients are as usual."""
    inputs = make_inputs(bias=True, hidden_size=16, vocab_size=600, lengths=(3, 4))
    unscored = next(token for token in range(600) if token not in inputs.labels)
    inputs.bias.data[[int(inputs.labels[2]), unscored]] = float("-inf")

    def run(backend):
        options = options_for(inputs, backend)
        logps = linear_logps(inputs.hidden_states, inputs.weight, inputs.labels, options)
        leaves = (inputs.hidden_states, inputs.weight, inputs.bias)
        return logps, torch.autograd.grad(logps, leaves, torch.ones_like(logps))

    logps, found = run(backend)
    expected_logps, expected = run("naive")
    assert expected_logps.isinf().tolist() == [row == 2 for row in range(7)]
    torch.testing.assert_close(logps, expected_logps, rtol=1e-12, atol=0.0)
    for gradient, exact in zip(found, expected, strict=True):
        assert relative_error(gradient, exact) <= 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_that_a_bias_rules_out(backend):
    """Whole blocks of the vocabulary are -inf."""
    inputs = make_inputs(bias=True, vocab_size=1200, lengths=SHORT_LENGTHS)
    with torch.no_grad():
        inputs.bias[:1100] = float("-inf")
    inputs.bias.requires_grad_(False)
    inputs.labels.clamp_(min=1100)
    expected = run_pair_loss(inputs, SIGMOID, options_for(inputs, "naive"))
    assert expected["logps"].isfinite().all()
    assert_close(run_pair_loss(inputs, SIGMOID, options_for(inputs, backend)), expected, 1e-11)
