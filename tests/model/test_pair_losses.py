"""The losses of single pairs are those that the head's op adds up."""

from __future__ import annotations

import pytest
import torch

from dpofast.model.pair_losses import pair_losses
from dpofast_kernels import PairExtras, linear_pair_loss, make_loss

BOUNDS = torch.tensor([0, 3, 5, 6, 10])  # two pairs
WEIGHTS = torch.tensor([0.25, 3.0], dtype=torch.float64)
CONFIDENCES = torch.tensor([0.6, 0.95], dtype=torch.float64)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("confidence", [None, CONFIDENCES])
@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "robust", "exo_pair"])
def test_value_and_derivatives_are_those_of_the_op(name, weights, confidence):
    torch.manual_seed(0)
    hidden_states = torch.randn(10, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(20, 8, dtype=torch.float64)
    labels, ref_logps = torch.randint(20, (10,)), -3.0 * BOUNDS.diff().double()
    loss = make_loss(name, 0.3, label_smoothing=0.1)
    extras = PairExtras(weights=weights, label_confidence=confidence)
    inputs = (hidden_states, weight, labels, BOUNDS, ref_logps, loss)
    output = linear_pair_loss(*inputs, extras=extras)
    (expected,) = torch.autograd.grad(output.loss, hidden_states)

    logps = (hidden_states @ weight.T).log_softmax(-1)[torch.arange(10), labels]
    summed = torch.stack([part.sum() for part in logps.split(BOUNDS.diff().tolist())])
    lengths = BOUNDS.diff().view(-1, 2)
    losses, *slopes = pair_losses(loss, summed - ref_logps, lengths, weights, confidence)
    torch.testing.assert_close(losses.sum(), output.loss, rtol=1e-12, atol=1e-12)
    (by_autograd,) = torch.autograd.grad(losses.sum(), hidden_states, retain_graph=True)
    torch.testing.assert_close(by_autograd, expected, rtol=1e-12, atol=1e-12)
    slopes = torch.stack(slopes, 1).flatten().detach()
    (by_slopes,) = torch.autograd.grad((slopes * summed).sum(), hidden_states)
    torch.testing.assert_close(by_slopes, expected, rtol=1e-12, atol=1e-12)
