"""The losses of single answers compared with figures worked out by hand, and with autograd."""

from __future__ import annotations

import math

import pytest
import torch

from dpofast_kernels import UNPAIRED_LOSSES, make_unpaired_loss

CASES = [
    make_unpaired_loss(name, beta, *weights)
    for name in UNPAIRED_LOSSES
    for beta in (0.02, 0.1, 2.0)
    for weights in ((1.0, 1.0), (1.5, 0.25))
]


def plain_formula(loss, logratios, is_desirable, z):
    """TRL's lines, per answer."""
    z = z if loss.name == "kto" else 0.0
    desirable = 1.0 - torch.sigmoid(loss.beta * (logratios - z))
    undesirable = 1.0 - torch.sigmoid(loss.beta * (z - logratios))
    return torch.where(
        is_desirable, loss.desirable_weight * desirable, loss.undesirable_weight * undesirable
    )


@pytest.mark.parametrize("loss", CASES, ids=repr)
def test_values_and_derivatives_are_those_of_the_plain_formula(loss):
    # 1 - sigmoid(x) loses digits further out.
    logratios = torch.linspace(-8.0, 8.0, 61, dtype=torch.float64) / loss.beta
    logratios.requires_grad_()
    is_desirable = torch.arange(61) % 3 == 0
    z = torch.tensor(1.7, dtype=torch.float64)
    expected = plain_formula(loss, logratios, is_desirable, z)
    (slopes,) = torch.autograd.grad(expected.sum(), logratios)
    value, found = loss.sequence_loss(logratios, is_desirable, z)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(found, slopes, rtol=1e-9, atol=1e-15)
    (own,) = torch.autograd.grad(value.sum(), logratios)
    torch.testing.assert_close(found, own, rtol=1e-9, atol=1e-15)


def test_values_by_hand():
    logratios, labels = torch.tensor([3.0, 3.0]).double(), torch.tensor([True, False])
    z = torch.tensor(1.0).double()
    kto = make_unpaired_loss("kto", 0.5, 2.0, 3.0).sequence_loss(logratios, labels, z)
    sigmoid = 1.0 / (1.0 + math.exp(-1.0))  # of 0.5 * (3 - 1)
    bell = sigmoid * (1.0 - sigmoid)
    assert kto[0].tolist() == pytest.approx([2.0 * (1.0 - sigmoid), 3.0 * sigmoid], rel=1e-14)
    assert kto[1].tolist() == pytest.approx([-2.0 * 0.5 * bell, 3.0 * 0.5 * bell], rel=1e-14)
    apo = make_unpaired_loss("apo_zero_unpaired", 0.5).sequence_loss(logratios, labels, z)
    sigmoid = 1.0 / (1.0 + math.exp(-1.5))
    assert apo[0].tolist() == pytest.approx([1.0 - sigmoid, sigmoid], rel=1e-14)


@pytest.mark.parametrize("loss", CASES, ids=repr)
def test_extreme_values_are_finite(loss):
    logratios = torch.tensor([-1e6, -800.0, 800.0, 1e6]).double().repeat(2)
    labels = torch.arange(8) < 4
    found = loss.sequence_loss(logratios, labels, torch.zeros(()).double())
    assert all(values.isfinite().all() for values in found)
    # Beyond x = 37, 1 - sigmoid(x) would be exactly 0.
    small, _ = loss.sequence_loss(
        torch.tensor([50.0 / loss.beta]).double(), torch.tensor([True]), torch.zeros(()).double()
    )
    assert small.item() == pytest.approx(loss.desirable_weight * math.exp(-50.0), rel=1e-12)


@pytest.mark.parametrize("loss", CASES, ids=repr)
def test_a_policy_that_equals_its_reference_loses_half_the_weight(loss):
    zero = torch.zeros(2).double()
    found, _ = loss.sequence_loss(zero, torch.tensor([True, False]), zero[0])
    assert found.tolist() == [loss.desirable_weight / 2, loss.undesirable_weight / 2]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("sigmoid",), ValueError, "Unknown loss 'sigmoid' of single answers, expected kto or"),
        (("kto", 0.0), ValueError, "beta is 0.0, expected a finite number above 0"),
        (("kto", "1"), TypeError, "beta is '1', expected a number"),
        (("kto", 0.1, -1.0), ValueError, "desirable_weight is -1.0"),
        (("kto", 0.1, 1.0, math.inf), ValueError, "undesirable_weight is inf"),
        (("kto", 0.1, 0.0, 0), ValueError, "are both 0, so there is nothing to learn"),
    ],
)
def test_wrong_options_are_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        make_unpaired_loss(*arguments)
