"""Losses that users write themselves: what is taken, and what is refused before training."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from dpofast_kernels import CustomLoss, make_custom_loss, make_loss


def margins(chosen, rejected):
    return 0.1 * (chosen - rejected)


def ipo_by_hand(chosen, rejected, lengths):
    return (chosen / lengths[:, 0] - rejected / lengths[:, 1] - 0.5 / 0.1).square()


def one_sided(chosen, rejected, lengths):
    return torch.nn.functional.softplus(-chosen)


def test_a_function_has_the_derivatives_of_the_built_in_loss():
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = 4 * torch.randn(2, 20, generator=generator, dtype=torch.float64)
    lengths = torch.arange(1, 41).view(-1, 2)
    own, built_in = make_custom_loss(ipo_by_hand, beta=0.1), make_loss("ipo", beta=0.1)
    for grad_mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with grad_mode():
            found = own.pair_loss(chosen, rejected, lengths)
        for value, expected in zip(
            found, built_in.pair_loss(chosen, rejected, lengths), strict=True
        ):
            assert not value.requires_grad
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-15)


def test_a_side_that_the_function_ignores_has_derivative_zero():
    zero = torch.zeros(2, dtype=torch.float64)
    loss, d_chosen, d_rejected = make_custom_loss(one_sided).pair_loss(
        zero, zero, torch.ones(2, 2, dtype=torch.int64)
    )
    assert loss.tolist() == pytest.approx([math.log(2)] * 2)
    assert d_chosen.tolist() == [-0.5, -0.5]
    assert d_rejected.tolist() == [0.0, 0.0]


def test_the_loss_says_whose_function_it_is():
    assert repr(make_custom_loss(one_sided, 0.2)) == "CustomLoss(beta=0.2, function=one_sided)"
    assert CustomLoss(function=one_sided) == CustomLoss(function=one_sided)
    assert CustomLoss(function=one_sided).name == "custom"


trained = torch.ones((), dtype=torch.float64, requires_grad=True)
calls = itertools.count()

REFUSED = {
    "sum": (lambda c, r, n: margins(c, r).sum(), "returned .* expected .* neither summed"),
    "mean over pairs": (lambda c, r, n: c - r - (c - r).mean(), "couples pairs"),
    "gradient over pairs": (
        lambda c, r, n: c - r + (c.mean() - c.mean().detach()) * c,
        "couples pairs",
    ),
    "place in the batch": (
        lambda c, r, n: (c - r) * torch.arange(len(c), device=c.device),
        "couples pairs",
    ),
    "lengths of others": (lambda c, r, n: (c - r) / n.sum(), "couples pairs"),
    "float32": (lambda c, r, n: (c - r).float(), r"float32 .* nor cast"),
    "detached": (lambda c, r, n: (c - r).detach(), "no gradient"),
    "steps": (lambda c, r, n: torch.sign(c - r), "gradient is 0 for every pair"),
    "logarithm": (lambda c, r, n: torch.log(c) - r, "aren't finite"),
    "root of a square": (lambda c, r, n: (c - r).square().sqrt(), "aren't finite .* 0 before"),
    "random": (lambda c, r, n: (c - r) * torch.rand(()).double(), "the second time"),
    "counter": (lambda c, r, n: (c - r) + next(calls), "the second time"),
    "trained": (lambda c, r, n: trained * (c - r), "other tensors that require gradients"),
    "module": (torch.nn.Bilinear(1, 1, 1), "failed"),
    "number": (lambda c, r, n: 0.5, "returned a float"),
    "arguments": (lambda c, r: c - r, "takes 2 positional arguments"),
    "in place": (lambda c, r, n: c.mul_(0.1) - r, "failed .*in-place"),
    "no function": ("sigmoid", "'sigmoid', expected a function"),
}


@pytest.mark.parametrize(("function", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_loss_of_single_pairs_is_refused(function, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make_custom_loss(function)


def test_other_options_of_losses_are_checked():
    with pytest.raises(ValueError, match="beta is 0"):
        make_custom_loss(one_sided, beta=0.0)
    with pytest.raises(ValueError, match="the custom loss has none"):
        CustomLoss(function=one_sided, label_smoothing=0.1)
