"""Losses that couple pairs: values, derivatives, sums, and a user's own functions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from dpofast_kernels import (
    COUPLED_LOSSES,
    CoupledLoss,
    DivergenceLoss,
    NotAPairLossError,
    PairExtras,
    linear_logps,
    linear_pair_loss,
    make_coupled_custom_loss,
    make_coupled_loss,
    make_loss,
    make_mixture,
    sum_per_sequence,
)


def log_probs(num_pairs=7, seed=0):
    """Log-probs [P] of policy and reference for both answers, fp64, and lengths [P, 2]."""
    generator = torch.Generator().manual_seed(seed)
    logps = -20.0 + 4.0 * torch.randn(4, num_pairs, generator=generator, dtype=torch.float64)
    return *logps, torch.arange(1, 2 * num_pairs + 1).view(-1, 2)


def by_hand(name, logps, beta, e):
    """[P]: the losses as TRL has them, by rank."""
    chosen, rejected, ref_chosen, ref_rejected, _ = logps
    better, worse = {
        "aot": (chosen - rejected, ref_chosen - ref_rejected),
        "aot_unpaired": (chosen - ref_chosen, rejected - ref_rejected),
    }[name]
    z = beta * (torch.sort(better, dim=0)[0] - torch.sort(worse, dim=0)[0])
    return -F.logsigmoid(z) * (1 - e) - F.logsigmoid(-z) * e


def test_there_is_a_formula_for_each():
    assert set(COUPLED_LOSSES) == {"aot", "aot_unpaired"}


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", COUPLED_LOSSES)
def test_values_and_derivatives_are_those_of_the_formula(name, smoothing):
    logps = log_probs()
    chosen, rejected = (each.requires_grad_() for each in logps[:2])
    expected = by_hand(name, logps, 0.3, smoothing)
    slopes = torch.autograd.grad(expected.sum(), (chosen, rejected))
    loss = make_coupled_loss(name, beta=0.3, label_smoothing=smoothing)
    for grad_mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with grad_mode():
            values, *found = loss.losses_and_slopes(*logps)
        torch.testing.assert_close(values.sum(), expected.detach().sum(), rtol=1e-13, atol=0)
        torch.testing.assert_close(found, list(slopes), rtol=1e-12, atol=1e-15)
    is_paired = torch.allclose(slopes[0], -slopes[1])
    assert is_paired is (name == "aot")
    torch.autograd.gradcheck(lambda c, r: loss.losses(c, r, *logps[2:]), (chosen, rejected))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", COUPLED_LOSSES)
def test_extreme_margins_are_finite(name, smoothing):
    far = torch.tensor([-1e4, -750.0, 0.0, 720.0, 1e4]).double()
    zeros = torch.zeros_like(far)
    loss = make_coupled_loss(name, beta=2.0, label_smoothing=smoothing)
    for logps in ((far, zeros, zeros, zeros), (zeros, far, zeros, zeros)):
        found = loss.losses_and_slopes(*logps, torch.ones(5, 2))
        assert all(values.isfinite().all() for values in found)
        expected = by_hand(name, (*logps, None), 2.0, smoothing)
        torch.testing.assert_close(found[0].sum(), expected.sum(), rtol=1e-13, atol=0)


def test_a_loss_belongs_to_the_pair_of_the_policys_log_ratio():
    chosen = torch.tensor([5.0, -4.0, 1.0]).double()  # ranks 2, 0, 1
    reference = torch.tensor([0.0, 2.0, -1.0]).double()  # sorted: -1, 0, 2
    zeros, lengths = torch.zeros(3).double(), torch.ones(3, 2, dtype=torch.int64)
    losses = make_coupled_loss("aot", beta=1.0).losses(chosen, zeros, reference, zeros, lengths)
    margins = torch.tensor([5.0 - 2.0, -4.0 + 1.0, 1.0 - 0.0]).double()
    torch.testing.assert_close(losses, -F.logsigmoid(margins))


def test_equal_log_ratios_keep_their_order():
    zeros, lengths = torch.zeros(3).double(), torch.ones(3, 2, dtype=torch.int64)
    reference = torch.tensor([2.0, 1.0, 3.0]).double()
    losses, d_chosen, _ = make_coupled_loss("aot", beta=1.0).losses_and_slopes(
        zeros, zeros, reference, zeros, lengths
    )
    torch.testing.assert_close(losses, F.softplus(torch.tensor([1.0, 2.0, 3.0]).double()))
    torch.testing.assert_close(d_chosen, -torch.sigmoid(torch.tensor([1.0, 2.0, 3.0]).double()))


@pytest.mark.parametrize("name", COUPLED_LOSSES)
def test_the_order_of_the_pairs_changes_nothing_for_a_pair(name):
    logps, loss = log_probs(9), make_coupled_loss(name)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    expected = torch.stack(loss.losses_and_slopes(*logps))
    found = torch.stack(loss.losses_and_slopes(*(each[order] for each in logps)))
    assert torch.equal(found, expected[:, order])
    fewer = torch.stack(loss.losses_and_slopes(*(each[:5] for each in logps)))
    assert not torch.allclose(fewer, expected[:, :5])


@pytest.mark.parametrize("name", COUPLED_LOSSES)
def test_the_first_value_is_ln_2(name):
    *_, ref_chosen, ref_rejected, lengths = log_probs()
    loss = make_coupled_loss(name, beta=0.7, label_smoothing=0.1)
    losses = loss.losses(ref_chosen, ref_rejected, ref_chosen, ref_rejected, lengths)
    assert losses.tolist() == pytest.approx([math.log(2)] * 7)
    assert loss.first_value(lengths).tolist() == losses.tolist()


def test_one_pair_has_the_sigmoid_loss():
    logps = log_probs(1)
    expected = torch.stack(make_loss("sigmoid").losses_and_slopes(*logps))
    for name in COUPLED_LOSSES:
        found = torch.stack(make_coupled_loss(name).losses_and_slopes(*logps))
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-16)


def test_a_log_prob_that_is_nan_shows_in_its_pair():
    logps = log_probs()
    logps[0][3] = math.nan
    for name in COUPLED_LOSSES:
        losses = make_coupled_loss(name).losses(*logps)
        assert losses.isnan().nonzero().flatten().tolist() == [3]


class TestSums:
    def test_it_is_the_weighted_sum_of_its_parts(self):
        names, weights = ["aot", "ipo", "discopop", "aot_unpaired"], [0.5, 2.0, 0.0, 1.0]
        loss = make_coupled_loss(names, weights, beta=0.4, discopop_tau=0.3)
        logps = log_probs()
        chosen, rejected = (each.requires_grad_() for each in logps[:2])
        expected = 0.5 * by_hand("aot", logps, 0.4, 0.0).sum()
        expected = expected + by_hand("aot_unpaired", logps, 0.4, 0.0).sum()
        ratios = ((chosen - logps[2]) / logps[4][:, 0], (rejected - logps[3]) / logps[4][:, 1])
        expected = expected + 2 * (ratios[0] - ratios[1] - 1 / 0.8).square().sum()
        slopes = torch.autograd.grad(expected, (chosen, rejected))
        values, *found = loss.losses_and_slopes(*logps)
        assert loss.names == tuple(names)
        torch.testing.assert_close(values.sum(), expected.detach(), rtol=1e-13, atol=0)
        torch.testing.assert_close(found, list(slopes), rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(loss.losses(*logps).detach(), values, rtol=1e-14, atol=0)
        first = loss.first_value(logps[4]).tolist()
        assert first == pytest.approx([1.5 * math.log(2) + 2 / (4 * 0.4**2)] * 7)

    def test_label_smoothing_goes_to_the_parts_that_have_it(self):
        loss = make_coupled_loss(["hinge", "aot"], None, label_smoothing=0.1)
        assert [part.label_smoothing for part in loss.parts] == [0.0, 0.1]

    def test_a_single_loss_may_have_a_weight(self):
        logps = log_probs()
        values = make_coupled_loss(["aot"], [0.25]).losses(*logps)
        torch.testing.assert_close(values, 0.25 * make_coupled_loss("aot").losses(*logps))

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: make_loss("aot"), "The aot loss couples pairs, .* make_coupled_loss makes it"),
            (lambda: make_mixture(["ipo", "aot"]), "The aot loss couples pairs, so .* makes it"),
            (lambda: make_coupled_loss("ipo"), "None of the losses ipo couples pairs"),
            (lambda: make_coupled_loss(["aot", "ip"]), "Unknown loss 'ip'. Did you mean 'ipo'"),
            (lambda: make_coupled_loss(["aot"], [0.0]), "All weights are 0"),
            (lambda: make_coupled_loss(["aot"], [1.0, 2.0]), "2 weights for 1 losses"),
            (lambda: make_coupled_loss("aot", label_smoothing=0.5), "label_smoothing is 0.5"),
            (lambda: make_coupled_loss("aot", dpop_lambda=1.0), "dpop_lambda is 1.0, but the aot"),
        ],
    )
    def test_what_is_refused(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()

    def test_another_divergence(self):
        with pytest.raises(ValueError, match="The aot loss has no other divergence"):
            DivergenceLoss(loss=make_coupled_loss("aot"), divergence="forward_kl")


@pytest.mark.parametrize("name", COUPLED_LOSSES)
def test_slopes_as_coefficients_give_the_gradients_of_the_loss(name):
    generator = torch.Generator().manual_seed(2)
    *refs, lengths = log_probs(4)[2:]
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.flatten().cumsum(0)])
    num_rows = int(bounds[-1])
    hidden_states = torch.randn(num_rows, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(30, 8, generator=generator, dtype=torch.float64)
    hidden_states.requires_grad_()
    weight.requires_grad_()
    labels = torch.randint(30, (num_rows,), generator=generator)
    loss = make_coupled_loss(name, beta=0.5)
    logps = sum_per_sequence(linear_logps(hidden_states, weight, labels), bounds)
    inputs = (logps[0::2], logps[1::2], *refs, lengths)
    expected = torch.autograd.grad(by_hand(name, inputs, 0.5, 0.0).sum(), (hidden_states, weight))
    slopes = loss.losses_and_slopes(*(each.detach() for each in inputs))[1:]
    coefficients = torch.stack(slopes, 1).flatten()  # [2P]
    given = (bounds, torch.stack(refs, 1).flatten())
    output = linear_pair_loss(
        *(hidden_states, weight, labels, *given, loss.linear),
        extras=PairExtras(coefficients=coefficients),
    )
    found = torch.autograd.grad(output.loss, (hidden_states, weight))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    with pytest.raises(TypeError, match=r"loss is a AOT.*, which couples pairs"):
        linear_pair_loss(hidden_states, weight, labels, *given, loss)


def centred(chosen, rejected, lengths):
    margins = chosen - rejected
    return F.softplus(-(margins - margins.mean()))


trained = torch.ones((), dtype=torch.float64, requires_grad=True)
calls = itertools.count()


class TestFunctions:
    def test_it_gets_all_pairs(self):
        logps = log_probs()
        chosen, rejected = (each.requires_grad_() for each in logps[:2])
        loss = make_coupled_custom_loss(centred, beta=0.2)
        expected = centred(chosen - logps[2], rejected - logps[3], logps[4])
        slopes = torch.autograd.grad(expected.sum(), (chosen, rejected))
        values, *found = loss.losses_and_slopes(*logps)
        torch.testing.assert_close(values, expected.detach(), rtol=0, atol=0)
        torch.testing.assert_close(found, list(slopes), rtol=0, atol=0)
        assert isinstance(loss, CoupledLoss)
        assert repr(loss) == "CoupledCustomLoss(beta=0.2, function=centred)"

    def test_it_need_not_be_defined_for_one_pair(self):
        def scaled(chosen, rejected, lengths):
            assert len(chosen) > 1
            return F.softplus(-(chosen - rejected) / (1 + chosen.var()))

        make_coupled_custom_loss(scaled)

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            (lambda c, r, n: (c - r).mean(), r"it returned \[\] torch.float64 for 33 pairs"),
            (lambda c, r, n: (c - r).detach(), "its result has no gradient"),
            (lambda c, r, n: (c - r) * trained, "other tensors that require gradients"),
            (lambda c, r, n: (c - r) / c.std(), "aren't finite"),
            (lambda c, r, n: 0 * (c - c.mean()), "its gradient is 0 for every pair"),
            (lambda c, r, n: c + next(calls), "something else for the same pairs"),
            (lambda c, r: c, r"it failed for 33 pairs \(TypeError"),
        ],
    )
    def test_what_is_refused(self, function, message):
        with pytest.raises(NotAPairLossError, match=message):
            make_coupled_custom_loss(function)
