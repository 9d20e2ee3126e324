from __future__ import annotations

import math

import pytest
import torch

from dpofast_kernels import DIVERGENCES, LOSSES, DivergenceLoss, make_loss
from tests.kernels.head.cases import make_inputs, options_for, run_pair_loss
from tests.kernels.preference.formulas import log_ratios, plain_formula, softplus

# TRL 1.16 allows these, too.
LOSSES_OF_DIFFERENCES = {
    *("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"),
}
COEFFICIENTS = (0.5, 0.0, -1.0, 1.0, 2.0)
CASES = [
    (name, divergence, coefficient)
    for name in sorted(LOSSES_OF_DIFFERENCES)
    for divergence in DIVERGENCES
    for coefficient in (COEFFICIENTS if divergence == "alpha_divergence" else (0.5,))
]


def less_one(x):
    """exp(x) - 1. PyTorch derives expm1 as its result plus 1, which is 0 for x far below 0."""
    return torch.where(x.abs() < 1.0, torch.expm1(x), torch.exp(x) - 1.0)


def score(divergence, u, c):
    """f'(ratio) as the paper has it, with a log-ratio u."""
    if divergence == "reverse_kl" or (divergence == "alpha_divergence" and c == 1.0):
        return u
    if divergence == "forward_kl":
        return -less_one(torch.clamp(-u, max=80.0))
    if divergence == "js_divergence":
        return math.log(2.0) - softplus(-u)
    return less_one(torch.clamp((c - 1.0) * u, max=80.0)) / (c - 1.0)


def inner(name, beta=0.1):
    smoothing = {"exo_pair": 1e-3, "robust": 0.1}.get(name, 0.0)
    return make_loss(name, beta=beta, label_smoothing=smoothing)


def divergence_loss(name, divergence, coefficient=0.5, beta=0.1):
    loss = inner(name, beta)
    return DivergenceLoss(
        beta=beta,
        label_smoothing=loss.label_smoothing,
        loss=loss,
        divergence=divergence,
        coefficient=coefficient,
    )


@pytest.mark.parametrize(("name", "divergence", "coefficient"), CASES)
def test_values_and_derivatives_are_those_of_the_formula(name, divergence, coefficient):
    chosen, rejected, lengths = log_ratios()
    chosen.requires_grad_()
    rejected.requires_grad_()
    scores = (score(divergence, u, coefficient) for u in (chosen, rejected))
    expected = plain_formula(inner(name), *scores, lengths)
    slopes = torch.autograd.grad(expected.sum(), (chosen, rejected))
    loss = divergence_loss(name, divergence, coefficient)
    value, *found = loss.pair_loss(chosen, rejected, lengths)
    assert value.isfinite().all()
    assert all(slope.isfinite().all() for slope in found)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found, list(slopes), rtol=1e-12, atol=1e-16)
    zeros = torch.zeros_like(chosen)
    first = loss.first_value(lengths)
    torch.testing.assert_close(first, loss.pair_loss(zeros, zeros, lengths)[0], rtol=1e-14, atol=0)


def test_worked_figures():
    """Log-ratios ln 2 and -ln 2: ratios 2 and 1/2."""
    u = torch.tensor([math.log(2.0), -math.log(2.0)], dtype=torch.float64)
    expected = {
        "reverse_kl": [math.log(2.0), -math.log(2.0)],
        "forward_kl": [1 - 1 / 2, 1 - 2],
        "js_divergence": [math.log(4 / 3), math.log(2 / 3)],
        "alpha_divergence": [(2**-0.5 - 1) / -0.5, (0.5**-0.5 - 1) / -0.5],
    }
    for name, values in expected.items():
        assert DIVERGENCES[name](u, 0.5)[0].tolist() == pytest.approx(values, rel=1e-14), name


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", ["torch", "triton", "triton_fused"])
@pytest.mark.slow
def test_every_back_end_of_the_head_computes_it(divergence, backend):
    inputs, loss = make_inputs(), divergence_loss("sigmoid", divergence)
    expected = run_pair_loss(inputs, loss, options_for(inputs, "naive"))
    actual = run_pair_loss(inputs, loss, options_for(inputs, backend))
    for got, want in zip(actual.values(), expected.values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_only_losses_of_differences_take_one():
    assert {name for name, loss in LOSSES.items() if loss.takes_divergence} == LOSSES_OF_DIFFERENCES
    with pytest.raises(ValueError, match="The apo_zero loss has no other divergence"):
        divergence_loss("apo_zero", "forward_kl")
    with pytest.raises(ValueError, match="Unknown divergence 'kl'; there are reverse_kl, "):
        divergence_loss("sigmoid", "kl")
    with pytest.raises(ValueError, match=r"beta is 0\.1, but that of the loss is 0\.5"):
        DivergenceLoss(loss=make_loss("sigmoid", 0.5), divergence="js_divergence")
    with pytest.raises(TypeError, match="coefficient is 'x', expected a number"):
        divergence_loss("sigmoid", "alpha_divergence", "x")
    with pytest.raises(ValueError, match="coefficient is nan"):
        divergence_loss("sigmoid", "alpha_divergence", math.nan)
