from __future__ import annotations

import math

import pytest
import torch

from dpofast_kernels import DivergenceLoss, make_loss, make_mixture
from dpofast_kernels.head.pairs import Pairs
from dpofast_kernels.head.pairs_triton import pair_loss_fwd
from tests.kernels.head.cases import make_inputs, options_for, run_pair_loss
from tests.kernels.preference.formulas import log_ratios, plain_formula

MIXTURES = {
    "mpo": (["sigmoid", "bco_pair"], [0.8, 0.2], {}),
    "equal": (["sigmoid_norm", "ipo", "apo_zero"], None, {"beta": 0.5}),
    "smoothed": (["robust", "hinge", "exo_pair"], [1.0, 0.5, 2.0], {"label_smoothing": 0.2}),
    "own options": (["discopop", "dpop"], [1.0, 0.1], {"discopop_tau": 0.3, "dpop_lambda": 5.0}),
    "one": (["sppo_hard"], [0.25], {}),
    "none of one": (["sigmoid", "ipo"], [1.0, 0.0], {}),
}


def mixture(name):
    names, weights, options = MIXTURES[name]
    return make_mixture(names, weights, **options)


@pytest.mark.parametrize("name", MIXTURES)
def test_it_is_the_weighted_sum_of_the_formulas(name):
    names, weights, options = MIXTURES[name]
    loss = mixture(name)
    assert loss.names == tuple(names)
    chosen, rejected, lengths = log_ratios()
    chosen.requires_grad_()
    rejected.requires_grad_()
    smoothing = {"label_smoothing": options.get("label_smoothing", 0.0)}
    expected = torch.zeros(len(chosen)).double()
    for each, weight in zip(names, weights or [1.0] * len(names), strict=True):
        own = {"discopop": ("discopop_tau",), "dpop": ("dpop_lambda",)}.get(each, ())
        part = make_loss(
            each,
            options.get("beta", 0.1),
            **(smoothing if each in ("robust", "exo_pair") else {}),
            **{option: options[option] for option in own},
        )
        expected = expected + weight * plain_formula(part, chosen, rejected, lengths)
    slopes = torch.autograd.grad(expected.sum(), (chosen, rejected))
    value, *found = loss.pair_loss(chosen, rejected, lengths)
    assert value.isfinite().all()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found, list(slopes), rtol=1e-12, atol=1e-15)
    zeros = torch.zeros_like(chosen)
    first = loss.first_value(lengths)
    torch.testing.assert_close(first, loss.pair_loss(zeros, zeros, lengths)[0], rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", MIXTURES)
def test_derivatives_lie_along_the_direction_that_all_parts_have(name):
    chosen, rejected, lengths = log_ratios()
    loss = mixture(name)
    direction = loss.direction(lengths)
    assert (direction is not None) == (name in ("smoothed", "none of one"))
    if direction is not None:
        _, d_chosen, d_rejected = loss.pair_loss(chosen, rejected, lengths)
        factor = d_chosen / direction[:, 0]
        torch.testing.assert_close(factor * direction[:, 1], d_rejected, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("name", ["mpo", "smoothed"])
@pytest.mark.parametrize("backend", ["torch", "triton", "triton_fused"])
def test_every_back_end_of_the_head_computes_it(name, backend):
    inputs, loss = make_inputs(), mixture(name)
    expected = run_pair_loss(inputs, loss, options_for(inputs, "naive"))
    actual = run_pair_loss(inputs, loss, options_for(inputs, backend))
    for got, want in zip(actual.values(), expected.values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_triton_sums_what_pytorch_mixes():
    loss = mixture("mpo")
    logps, ref_logps = torch.tensor([-3.0, -1.0, -2.0, -4.0]).double(), torch.zeros(2).double()
    terms = pair_loss_fwd(logps, Pairs(torch.tensor([0, 3, 4]), [0, 3, 4], ref_logps, loss))
    value, *slopes = loss.pair_loss(
        torch.tensor([-6.0]).double(), torch.tensor([-4.0]).double(), torch.tensor([[3, 1]])
    )
    assert terms.losses.item() == value.item()
    assert terms.slopes.tolist() == [[slope.item() for slope in slopes]]


def test_one_loss_of_weight_1_is_that_loss():
    assert make_mixture(["ipo"], beta=0.3) == make_loss("ipo", beta=0.3)
    assert make_mixture(["ipo"], [1], beta=0.3) == make_loss("ipo", beta=0.3)


@pytest.mark.parametrize(
    ("names", "options", "text"),
    [
        ([], {}, "names is \\[\\], expected a list"),
        ("sigmoid", {}, "names is 'sigmoid', expected a list"),
        ([["sigmoid"]], {}, "Unknown loss"),
        (["sigmoid", "sigmod"], {}, "Unknown loss 'sigmod'. Did you mean 'sigmoid'"),
        (["sigmoid", "ipo"], {"weights": [1.0]}, "1 weights for 2 losses"),
        (["sigmoid", "ipo"], {"weights": [1.0, -1.0]}, "at least 0"),
        (["sigmoid", "ipo"], {"weights": [1.0, math.inf]}, "finite"),
        (["sigmoid", "ipo"], {"weights": [0.0, 0.0]}, "nothing would be trained"),
        (["hinge", "ipo"], {"label_smoothing": 0.1}, "the hinge loss has none"),
        (["sigmoid", "ipo"], {"dpop_lambda": 3.0}, "choose the dpop loss"),
        (["sigmoid", "exo_pair"], {}, "set it to 1e-3"),
    ],
)
def test_a_wrong_mixture_is_refused(names, options, text):
    with pytest.raises(ValueError, match=text):
        make_mixture(names, **options)


def test_parts_must_share_beta():
    with pytest.raises(ValueError, match="differ in beta"):
        type(mixture("mpo"))(
            beta=0.1, parts=(make_loss("ipo", 0.1), make_loss("ipo", 0.2)), weights=(1.0, 1.0)
        )


def test_a_divergence_can_be_a_part():
    part = DivergenceLoss(beta=0.1, loss=make_loss("sigmoid"), divergence="js_divergence")
    loss = type(mixture("mpo"))(beta=0.1, parts=(part, make_loss("ipo")), weights=(1.0, 1.0))
    assert loss.names == ("sigmoid", "ipo")
    chosen, rejected, lengths = log_ratios()
    value = loss.pair_loss(chosen, rejected, lengths)[0]
    both = [each.pair_loss(chosen, rejected, lengths)[0] for each in (part, make_loss("ipo"))]
    torch.testing.assert_close(value, sum(both), rtol=1e-14, atol=0.0)
