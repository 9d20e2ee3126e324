"""The losses compared with figures worked out by hand, with autograd, and with Triton."""

from __future__ import annotations

import math

import pytest
import torch

from dpofast_kernels import make_loss
from dpofast_kernels.head.pairs_triton import pair_loss_fwd
from dpofast_kernels.preference import LOSSES
from dpofast_kernels.preference.formulas_triton import FORMULAS

CASES = [
    make_loss(name, beta=beta, label_smoothing=smoothing)
    for name, loss in LOSSES.items()
    for beta in (0.02, 0.1, 2.0)
    for smoothing in ((0.0, 0.1, 0.49) if loss.takes_label_smoothing else (0.0,))
]
CASE_NAMES = [f"{loss.name}-{loss.beta}-{loss.label_smoothing}" for loss in CASES]


def log_ratios():
    """Log-ratios [P] each, ordinary and extreme ones, and lengths [P, 2]."""
    grid = torch.tensor([-1e4, -750.0, -37.0, -1.3, 0.0, 1e-12, 0.7, 40.0, 720.0, 1e4]).double()
    chosen, rejected = (side.flatten() for side in torch.meshgrid(grid, grid, indexing="ij"))
    lengths = torch.arange(1, 2 * len(chosen) + 1).view(-1, 2)
    return chosen, rejected, lengths


def values(name, chosen, rejected, lengths=((1, 1),), **options):
    chosen, rejected = torch.tensor([[chosen], [rejected]], dtype=torch.float64)
    results = make_loss(name, **options).pair_loss(chosen, rejected, torch.tensor(lengths))
    return [value.item() for value in results]


@pytest.mark.parametrize("loss", CASES, ids=CASE_NAMES)
def test_derivatives_are_those_of_autograd(loss):
    chosen, rejected, lengths = log_ratios()
    chosen.requires_grad_()
    rejected.requires_grad_()
    value, d_chosen, d_rejected = loss.pair_loss(chosen, rejected, lengths)
    assert value.isfinite().all()
    value.sum().backward()
    torch.testing.assert_close(d_chosen, chosen.grad, rtol=1e-12, atol=1e-16)
    torch.testing.assert_close(d_rejected, rejected.grad, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("loss", CASES, ids=CASE_NAMES)
def test_triton_formula_is_the_same(loss):
    # The interpreter is slow. Every third pair still has each value on both sides.
    chosen, rejected, lengths = (tensor[::3] for tensor in log_ratios())
    # Sequences of one token: their log-probs are the log-ratios. Lengths have a test of their own.
    expected = loss.pair_loss(chosen, rejected, torch.ones_like(lengths))
    logps = torch.stack([chosen, rejected], 1).flatten()
    terms = pair_loss_fwd(logps, torch.arange(len(logps) + 1), torch.zeros_like(logps), loss)
    assert torch.equal(terms.logps, logps)
    torch.testing.assert_close(terms.losses, expected[0], rtol=1e-13, atol=1e-300)
    d_logps = torch.stack(expected[1:], 1).flatten()
    # With smoothed labels, two numbers of the size of beta are subtracted.
    atol = 1e-15 if loss.label_smoothing else 1e-300
    torch.testing.assert_close(terms.d_logps, d_logps, rtol=1e-13, atol=atol)


def test_triton_formula_of_the_hinge_is_the_same_at_its_kink():
    loss = make_loss("hinge", beta=0.5)
    logps = torch.tensor([2.0, 0.0]).double()  # beta times their difference is 1
    terms = pair_loss_fwd(logps, torch.arange(3), torch.zeros_like(logps), loss)
    expected = loss.pair_loss(logps[:1], logps[1:], torch.ones(1, 2))
    assert (terms.losses.item(), terms.d_logps.tolist()) == (0.0, [0.0, 0.0])
    assert [value.item() for value in expected] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("loss", CASES, ids=CASE_NAMES)
def test_triton_sums_and_lengths(loss):
    generator = torch.Generator().manual_seed(0)
    bounds = torch.tensor([0, 3, 2051, 2052, 3076])
    logps = torch.randn(3076, generator=generator).double()
    ref_logps = torch.randn(4, generator=generator).double()
    sums = torch.stack([part.sum() for part in logps.tensor_split(bounds[1:-1])])
    logratios = sums - ref_logps
    expected = loss.pair_loss(logratios[0::2], logratios[1::2], bounds.diff().view(-1, 2))
    terms = pair_loss_fwd(logps, bounds, ref_logps, loss)
    torch.testing.assert_close(terms.logps, sums, rtol=1e-13, atol=1e-12)
    torch.testing.assert_close(terms.losses, expected[0], rtol=1e-10, atol=1e-13)
    d_logps = torch.stack(expected[1:], 1).flatten()
    torch.testing.assert_close(terms.d_logps, d_logps, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("loss", CASES, ids=CASE_NAMES)
def test_derivatives_lie_along_the_direction(loss):
    chosen, rejected, lengths = log_ratios()
    _, d_chosen, d_rejected = loss.pair_loss(chosen, rejected, lengths)
    direction = loss.direction(lengths)
    assert direction.shape == (len(chosen), 2)
    factor = d_chosen / direction[:, 0]
    torch.testing.assert_close(factor * direction[:, 1], d_rejected, rtol=1e-12, atol=0.0)


def test_every_loss_has_its_triton_formula():
    assert FORMULAS.keys() == LOSSES.keys()


class TestWorkedFigures:
    def test_sigmoid(self):
        """Policy -2.0 and -3.5, reference -2.3 and -3.0: margin 0.08."""
        loss, d_chosen, d_rejected = values("sigmoid", -2.0 + 2.3, -3.5 + 3.0, beta=0.1)
        assert loss == pytest.approx(math.log1p(math.exp(-0.08)), rel=1e-14)
        assert loss == pytest.approx(0.653, abs=1e-3)
        assert d_chosen == pytest.approx(-0.1 * (1.0 - 1.0 / (1.0 + math.exp(-0.08))), rel=1e-14)
        assert d_rejected == -d_chosen

    def test_sigmoid_at_zero_log_ratios(self):
        assert values("sigmoid", 0.0, 0.0)[0] == pytest.approx(math.log(2.0), rel=1e-15)

    def test_conservative_dpo(self):
        """At z = 0.5, e = 0.1: 0.9 log(1 + e^-0.5) + 0.1 log(1 + e^0.5)."""
        loss, d_chosen, _ = values("sigmoid", 3.0, -2.0, beta=0.1, label_smoothing=0.1)
        assert loss == pytest.approx(0.4740769841 + 0.1 * 0.5, rel=1e-9)
        assert d_chosen == pytest.approx(0.1 * (0.6224593312 - 0.9), rel=1e-9)

    def test_conservative_dpo_is_least_where_the_labels_are_believed(self):
        margin = math.log(0.9 / 0.1)
        slope = values("sigmoid", margin / 0.1, 0.0, beta=0.1, label_smoothing=0.1)[1]
        assert slope == pytest.approx(0.0, abs=1e-16)

    def test_hinge(self):
        assert values("hinge", 0.3, -0.5, beta=0.1) == pytest.approx([0.92, -0.1, 0.1])
        assert values("hinge", 11.0, 0.0, beta=0.1) == [0.0, 0.0, 0.0]
        assert values("hinge", 2.0, 0.0, beta=0.5) == [0.0, 0.0, 0.0]  # the kink

    def test_ipo_divides_by_the_tokens(self):
        """(3/2 - (-2)/4 - 1/(2 0.1))^2 = (-3)^2, slopes 2 (-3) / 2 and -2 (-3) / 4."""
        found = values("ipo", 3.0, -2.0, ((2, 4),), beta=0.1)
        assert found == pytest.approx([9.0, -3.0, 1.5])

    @pytest.mark.parametrize("margin", [1e5, -1e5, 1e300, -1e300])
    def test_extreme_margins_stay_finite(self, margin):
        loss, d_chosen, d_rejected = values("sigmoid", margin, 0.0, beta=0.1)
        assert loss == max(0.0, -0.1 * margin)
        assert d_chosen == -d_rejected == (0.0 if margin > 0 else -0.1)


class TestMakeLoss:
    def test_fields(self):
        loss = make_loss("sigmoid", beta=0.5, label_smoothing=0.1)
        assert (loss.name, loss.beta, loss.label_smoothing) == ("sigmoid", 0.5, 0.1)
        assert make_loss("ipo") == make_loss("ipo", 0.1)
        assert hash(loss) == hash(make_loss("sigmoid", 0.5, 0.1))

    @pytest.mark.parametrize("beta", [0.0, -0.1, math.inf, math.nan])
    def test_beta_out_of_range(self, beta):
        with pytest.raises(ValueError, match=f"beta is {beta}, expected a finite number above 0"):
            make_loss("sigmoid", beta=beta)

    @pytest.mark.parametrize("smoothing", [-0.1, 0.5, 1.0, math.nan])
    def test_label_smoothing_out_of_range(self, smoothing):
        with pytest.raises(ValueError, match=f"label_smoothing is {smoothing}"):
            make_loss("sigmoid", label_smoothing=smoothing)

    @pytest.mark.parametrize("name", ["hinge", "ipo"])
    def test_only_sigmoid_takes_label_smoothing(self, name):
        with pytest.raises(ValueError, match=f"the {name} loss has none"):
            make_loss(name, label_smoothing=0.1)

    @pytest.mark.parametrize(
        ("name", "hint"),
        [
            ("sigmod", "Did you mean 'sigmoid'?"),
            ("hnige", "Did you mean 'hinge'?"),
            ("sigmoid_norm", ""),  # a loss of its own in TRL
            ("dpo", ""),
            ("simpo", ""),
        ],
    )
    def test_only_a_typo_is_taken_for_a_loss(self, name, hint):
        with pytest.raises(ValueError, match=f"Unknown loss '{name}'") as caught:
            make_loss(name)
        assert str(caught.value) == " ".join(
            filter(None, [f"Unknown loss '{name}'.", hint, "The losses are: hinge, ipo, sigmoid."])
        )

    @pytest.mark.parametrize("value", ["0.1", None, True, torch.tensor(0.1)], ids=str)
    @pytest.mark.parametrize("name", ["beta", "label_smoothing"])
    def test_values_that_are_no_numbers(self, name, value):
        with pytest.raises(TypeError, match=f"{name} is .*, expected a number"):
            make_loss("sigmoid", **{name: value})

    def test_unknown_name(self):
        with pytest.raises(ValueError, match="Did you mean 'sigmoid'"):
            make_loss("sigmod")
        with pytest.raises(ValueError, match="The losses are: hinge, ipo, sigmoid"):
            make_loss("xyz")
        with pytest.raises(ValueError, match=r"Unknown loss \['sigmoid'\]"):
            make_loss(["sigmoid"])


@pytest.mark.parametrize("loss", CASES, ids=CASE_NAMES)
def test_a_run_gone_wrong_shows_in_the_loss(loss):
    nan = torch.tensor([float("nan")]).double()
    one = torch.ones(1).double()
    assert loss.pair_loss(nan, one, torch.ones(1, 2))[0].isnan()
    terms = pair_loss_fwd(torch.cat([nan, one]), torch.arange(3), torch.zeros(2).double(), loss)
    assert terms.losses.isnan()
