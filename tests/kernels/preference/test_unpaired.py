"""The losses of single answers compared with figures by hand, with autograd, and with Triton."""

from __future__ import annotations

import math

import pytest
import torch

from dpofast_kernels import UNPAIRED_LOSSES, make_unpaired_loss
from dpofast_kernels.head.singles import Singles
from dpofast_kernels.head.singles_triton import sequence_loss_fwd
from dpofast_kernels.preference import KTOLoss
from dpofast_kernels.preference.formulas_triton import UNPAIRED_FORMULAS
from tests.kernels.preference.formulas import sigmoid

CASES = [
    make_unpaired_loss(name, beta, *weights)
    for name in UNPAIRED_LOSSES
    for beta in (0.02, 0.1, 2.0)
    for weights in ((1.0, 1.0), (1.5, 0.25))
]


# Triton's interpreter is slow: one beta is enough for it.
TRITON_CASES = [loss for loss in CASES if loss.beta == 0.1]
Z = torch.tensor(1.7).double()


def plain_formula(loss, logratios, is_desirable, z):
    """[S]: the losses as docs/losses.md has them; 1 - s(x) is s(-x), which loses no digits."""
    z = z if loss.name == "kto" else 0.0
    desirable = loss.desirable_weight * sigmoid(-loss.beta * (logratios - z))
    undesirable = loss.undesirable_weight * sigmoid(-loss.beta * (z - logratios))
    return torch.where(is_desirable, desirable, undesirable)


def answers():
    """Log-ratios [S], ordinary and extreme ones, labels [S] and weights [S]."""
    ordinary = torch.linspace(-60.0, 60.0, 61).double()
    extreme = torch.tensor([-1e4, -750.0, -37.0, 0.0, 1e-12, 40.0, 720.0, 1e4]).double()
    logratios = torch.cat([ordinary, extreme]).repeat_interleave(2)
    weights = torch.linspace(0.0, 2.0, len(logratios)).double()
    return logratios, torch.arange(len(logratios)) % 2 == 0, weights


def in_triton(loss, per_token_logps, bounds, ref_logps, is_desirable, z, weights=None):
    singles = Singles(bounds, bounds.tolist(), ref_logps, is_desirable, loss, z, weights)
    return sequence_loss_fwd(per_token_logps, singles)


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("loss", CASES, ids=repr)
def test_values_and_derivatives_are_those_of_the_plain_formula(loss, is_weighted):
    logratios, is_desirable, weights = answers()
    logratios.requires_grad_()
    expected = plain_formula(loss, logratios, is_desirable, Z)
    if is_weighted:
        expected = expected * weights
    (slopes,) = torch.autograd.grad(expected.sum(), logratios)
    given = (weights,) if is_weighted else ()
    value, found = loss.sequence_loss(logratios, is_desirable, Z, *given)
    assert value.isfinite().all()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found, slopes, rtol=1e-12, atol=1e-16)
    # The loss itself can be differentiated, too; PyTorch's own sigmoid rounds 1 - s(x) for that.
    (own,) = torch.autograd.grad(value.sum(), logratios)
    torch.testing.assert_close(found, own, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("loss", TRITON_CASES, ids=repr)
def test_triton_formula_is_the_same(loss, is_weighted):
    logratios, is_desirable, weights = answers()
    given = (weights,) if is_weighted else ()
    expected = loss.sequence_loss(logratios, is_desirable, Z, *given)
    # Sequences of one token: their log-probs are the log-ratios.
    bounds = torch.arange(len(logratios) + 1)
    terms = in_triton(loss, logratios, bounds, torch.zeros_like(logratios), is_desirable, Z, *given)
    assert torch.equal(terms.logps, logratios)
    torch.testing.assert_close(terms.losses, expected[0], rtol=1e-13, atol=1e-300)
    torch.testing.assert_close(terms.d_logps, expected[1], rtol=1e-13, atol=1e-300)


@pytest.mark.parametrize("loss", TRITON_CASES, ids=repr)
def test_triton_sums_and_metrics(loss):
    generator = torch.Generator().manual_seed(0)
    bounds = torch.tensor([0, 3, 2051, 2052])
    logps = torch.randn(2052, generator=generator).double()
    ref_logps, is_desirable = logps[:3], torch.tensor([True, False, True])
    sums = torch.stack([part.sum() for part in logps.tensor_split(bounds[1:-1])])
    expected = loss.sequence_loss(sums - ref_logps, is_desirable, Z)
    terms = in_triton(loss, logps, bounds, ref_logps, is_desirable, Z)
    torch.testing.assert_close(terms.logps, sums, rtol=1e-13, atol=1e-12)
    torch.testing.assert_close(terms.losses, expected[0], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(terms.d_logps, expected[1], rtol=1e-12, atol=1e-15)
    logratios = sums - ref_logps
    metrics = torch.stack([loss.beta * logratios, logratios / bounds.diff()])
    torch.testing.assert_close(terms.metrics, metrics, rtol=1e-12, atol=1e-13)


def test_every_loss_has_its_triton_formula():
    assert UNPAIRED_FORMULAS.keys() == UNPAIRED_LOSSES.keys()


class OwnLoss(KTOLoss):
    """A subclass keeps the name of its base, but Triton's formula of the base isn't its own."""

    def sequence_loss(self, logratios, is_desirable, z, weights=None):
        loss, slopes = super().sequence_loss(-logratios, is_desirable, z, weights)
        return loss, -slopes


def test_a_loss_without_a_formula_in_triton():
    logratios, is_desirable, weights = answers()
    loss, bounds = OwnLoss(0.1), torch.arange(len(logratios) + 1)
    expected = loss.sequence_loss(logratios, is_desirable, Z, weights)
    terms = in_triton(
        loss, logratios, bounds, torch.zeros_like(logratios), is_desirable, Z, weights
    )
    torch.testing.assert_close((terms.losses, terms.d_logps), expected, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("loss", TRITON_CASES, ids=repr)
def test_a_run_gone_wrong_shows_in_the_loss(loss):
    logps, labels = torch.tensor([float("nan"), 1.0]).double(), torch.tensor([True, False])
    found, _ = loss.sequence_loss(logps, labels, Z)
    terms = in_triton(loss, logps, torch.arange(3), torch.zeros(2).double(), labels, Z)
    assert found.isnan().tolist() == terms.losses.isnan().tolist() == [True, False]


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
