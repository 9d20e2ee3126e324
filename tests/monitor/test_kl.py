"""The distances from the reference, against sums over single tokens."""

from __future__ import annotations

import pytest
import torch

from dpofast.monitor.kl import kl_sums


def test_the_sums_are_those_of_the_tokens():
    torch.manual_seed(0)
    lengths = [3, 1, 6, 2]
    policy = [torch.randn(n, dtype=torch.float64) for n in lengths]
    reference = [torch.randn(n, dtype=torch.float64) for n in lengths]
    logps, ref_logps = (torch.stack([x.sum() for x in each]) for each in (policy, reference))
    bounds = torch.tensor([5, 8, 9, 15, 17])  # rows of a packed head may begin anywhere
    sums, tokens = kl_sums(logps.requires_grad_(), ref_logps, bounds.diff())
    ratios = torch.cat(policy) - torch.cat(reference)
    assert tokens == len(ratios) == 12
    assert (sums["kl"] / tokens).item() == pytest.approx(ratios.mean().item(), rel=1e-12)
    answers = sum(abs((p - r).sum().item()) for p, r in zip(policy, reference, strict=True))
    assert sums["kl/absolute"].item() == pytest.approx(answers, rel=1e-12)
    assert not sums["kl"].requires_grad


def test_on_texts_of_the_policy_the_mean_is_the_kl_divergence():
    """Each of the vocabulary's tokens occurs as often as the policy draws it: 1, 2 and 5 of 8."""
    policy, reference = torch.tensor([0.125, 0.25, 0.625]), torch.tensor([0.5, 0.25, 0.25])
    drawn = [0, *[1] * 2, *[2] * 5]
    lengths = torch.ones(8, dtype=torch.int64)
    sums, tokens = kl_sums(policy.log()[drawn], reference.log()[drawn], lengths)
    expected = (policy * (policy / reference).log()).sum().item()
    assert (sums["kl"] / tokens).item() == pytest.approx(expected, rel=1e-6)


def test_chosen_and_rejected_cancel_out_in_one_of_the_two_only():
    logps, ref_logps = torch.tensor([-1.0, -4.0]), torch.tensor([-2.0, -3.0])
    sums, tokens = kl_sums(logps, ref_logps, torch.tensor([2, 3]))
    assert (sums["kl"].item(), sums["kl/absolute"].item(), tokens.item()) == (0.0, 2.0, 5)


def test_discounted_tokens_count_by_their_discount():
    logps, ref_logps = torch.tensor([-3.0, -2.0]).double(), torch.tensor([-1.0, -3.0]).double()
    weights = torch.tensor([1.0, 1.0, 1.0, 0.5, 0.0]).double()
    sums, tokens = kl_sums(logps, ref_logps, torch.tensor([2, 3]), weights)
    assert (sums["kl"].item(), sums["kl/absolute"].item(), tokens.item()) == (-1.0, 3.0, 3.5)
