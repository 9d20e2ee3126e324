"""The losses compared with figures worked out by hand, with autograd, and with Triton."""

from __future__ import annotations

import math

import pytest
import torch

from dpofast_kernels import make_loss
from dpofast_kernels.head.pairs import Pairs
from dpofast_kernels.head.pairs_triton import pair_loss_fwd
from dpofast_kernels.preference import COUPLED_LOSSES, LOSS_OPTIONS, LOSSES
from dpofast_kernels.preference.formulas_triton import FORMULAS
from tests.kernels.preference.formulas import inputs_of, plain_formula

SMOOTHINGS = {
    **dict.fromkeys(("sigmoid", "sigmoid_norm", "robust"), (0.0, 0.1, 0.49)),
    **dict.fromkeys(("cpo", "simpo", "alphapo"), (0.0, 0.1)),
    "exo_pair": (1e-3, 0.1, 0.49),
}
OPTIONS = {
    "discopop": [{}, {"discopop_tau": 1e-3}, {"discopop_tau": 1.0}],
    "dpop": [{}, {"dpop_lambda": 0.0}, {"dpop_lambda": 3.0}],
    "simpo": [{}, {"simpo_gamma": -1.5}],
    "alphapo": [{}, {"alpha": 0.25, "simpo_gamma": 0.1}, {"alpha": -0.5}],
}
CASES = [
    make_loss(name, beta=beta, label_smoothing=smoothing, **options)
    for name in LOSSES
    for beta in (0.02, 0.1, 2.0)
    for smoothing in SMOOTHINGS.get(name, (0.0,))
    for options in OPTIONS.get(name, [{}])
]
CASE_NAMES = [f"{loss.name}-{loss.beta}-{loss.label_smoothing}-{loss.options}" for loss in CASES]
# Triton's interpreter is slow: one beta is enough for it.
TRITON_CASES = [loss for loss in CASES if loss.beta == 0.1]
TRITON_NAMES = [CASE_NAMES[CASES.index(loss)] for loss in TRITON_CASES]
ONE_OF_EACH = list({loss.name: loss for loss in TRITON_CASES}.values())
ALONG_DIFFERENCE = {"sigmoid", "hinge", "robust", "exo_pair", "discopop", "cpo", "cpo_hinge"}
ALONG_MEAN_DIFFERENCE = {"sigmoid_norm", "ipo", "cpo_ipo", "simpo"}


def values(name, chosen, rejected, lengths=((1, 1),), **options):
    chosen, rejected = torch.tensor([[chosen], [rejected]], dtype=torch.float64)
    results = make_loss(name, **options).pair_loss(chosen, rejected, torch.tensor(lengths))
    return [value.item() for value in results]


@pytest.mark.parametrize("loss", CASES, ids=CASE_NAMES)
def test_values_and_derivatives_are_those_of_the_plain_formula(loss):
    chosen, rejected, lengths = inputs_of(loss)
    chosen.requires_grad_()
    rejected.requires_grad_()
    expected = plain_formula(loss, chosen, rejected, lengths)
    slopes = torch.autograd.grad(expected.sum(), (chosen, rejected))
    value, *found = loss.pair_loss(chosen, rejected, lengths)
    assert value.isfinite().all()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found, list(slopes), rtol=1e-12, atol=1e-16)
    # The loss itself can be differentiated, too.
    own = torch.autograd.grad(value.sum(), (chosen, rejected))
    torch.testing.assert_close(found, list(own), rtol=1e-12, atol=1e-16)


def in_triton(logps, bounds, ref_logps, loss, smoothing=None):
    return pair_loss_fwd(
        logps, Pairs(bounds, bounds.tolist(), ref_logps, loss, smoothing=smoothing)
    )


WITH_REFERENCE = [loss for loss in CASES if not loss.is_reference_free]


@pytest.mark.parametrize("loss", WITH_REFERENCE, ids=lambda loss: repr(loss))
def test_first_value_is_the_loss_of_a_policy_that_equals_its_reference(loss):
    zeros, lengths = torch.zeros(3).double(), torch.tensor([[1, 9], [7, 7], [300, 2]])
    first = loss.first_value(lengths)
    torch.testing.assert_close(
        first, loss.pair_loss(zeros, zeros, lengths)[0], rtol=1e-14, atol=1e-16
    )


@pytest.mark.parametrize("loss", TRITON_CASES, ids=TRITON_NAMES)
def test_triton_formula_is_the_same(loss):
    # The interpreter is slow. Every seventh pair still has each value on both sides.
    chosen, rejected, lengths = (tensor[::7] for tensor in inputs_of(loss))
    # Sequences of one token: their log-probs are the log-ratios. Lengths have a test of their own.
    expected = loss.pair_loss(chosen, rejected, torch.ones_like(lengths))
    logps = torch.stack([chosen, rejected], 1).flatten()
    terms = in_triton(logps, torch.arange(len(logps) + 1), torch.zeros_like(logps), loss)
    assert torch.equal(terms.logps, logps)
    # These losses subtract numbers of the size of 1 or of beta from each other.
    subtracts = loss.label_smoothing or loss.name in ("apo_down", "nca_pair", "discopop")
    rtol, atol = (1e-12, 1e-15) if subtracts else (1e-13, 1e-300)
    torch.testing.assert_close(terms.losses, expected[0], rtol=rtol, atol=atol)
    torch.testing.assert_close(terms.slopes, torch.stack(expected[1:], 1), rtol=rtol, atol=atol)


def test_triton_formula_of_the_hinge_is_the_same_at_its_kink():
    loss = make_loss("hinge", beta=0.5)
    logps = torch.tensor([2.0, 0.0]).double()  # beta times their difference is 1
    terms = in_triton(logps, torch.arange(3), torch.zeros_like(logps), loss)
    expected = loss.pair_loss(logps[:1], logps[1:], torch.ones(1, 2))
    assert (terms.losses.item(), terms.slopes.tolist()) == (0.0, [[0.0, 0.0]])
    assert [value.item() for value in expected] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("loss", ONE_OF_EACH, ids=lambda loss: loss.name)
def test_triton_sums_and_lengths(loss):
    generator = torch.Generator().manual_seed(0)
    bounds = torch.tensor([0, 3, 2051, 2052, 3076])
    logps = torch.randn(3076, generator=generator).double()
    ref_logps = torch.randn(4, generator=generator).double()
    sums = torch.stack([part.sum() for part in logps.tensor_split(bounds[1:-1])])
    logratios = sums - ref_logps
    expected = loss.pair_loss(logratios[0::2], logratios[1::2], bounds.diff().view(-1, 2))
    terms = in_triton(logps, bounds, ref_logps, loss)
    torch.testing.assert_close(terms.logps, sums, rtol=1e-13, atol=1e-12)
    torch.testing.assert_close(terms.losses, expected[0], rtol=1e-10, atol=1e-13)
    slopes = torch.stack(expected[1:], 1)
    torch.testing.assert_close(terms.slopes, slopes, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("loss", CASES, ids=CASE_NAMES)
def test_derivatives_lie_along_the_direction(loss):
    chosen, rejected, lengths = inputs_of(loss)
    _, d_chosen, d_rejected = loss.pair_loss(chosen, rejected, lengths)
    direction = loss.direction(lengths)
    is_bent = loss.name != "alphapo" or loss.alpha
    if is_bent and loss.name not in ALONG_DIFFERENCE | ALONG_MEAN_DIFFERENCE:
        assert direction is None
        return
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

    def test_sigmoid_norm_divides_by_the_tokens(self):
        """z = 2 (3/2 - (-2)/4) = 4; the slope of -log sigmoid there is -sigmoid(-4)."""
        found = values("sigmoid_norm", 3.0, -2.0, ((2, 4),), beta=2.0)
        assert found == pytest.approx([0.0181499279, -0.0179862100, 0.0089931050], rel=1e-8)

    def test_robust(self):
        """At z = 0.5, e = 0.1: (0.9 log(1 + e^-0.5) - 0.1 log(1 + e^0.5)) / 0.8."""
        loss, d_chosen, _ = values("robust", 3.0, -2.0, beta=0.1, label_smoothing=0.1)
        assert loss == pytest.approx((0.9 * 0.4740769841 - 0.1 * 0.9740769841) / 0.8, rel=1e-9)
        assert d_chosen == pytest.approx(-0.1 * (0.9 * 0.3775406688 + 0.0622459331) / 0.8, rel=1e-9)

    def test_robust_has_no_lower_bound(self):
        assert values("robust", 1e4, 0.0, beta=0.1, label_smoothing=0.1)[0] == -125.0

    def test_exo_pair_is_least_where_the_labels_are_believed(self):
        """There q = 1 - e, so the divergence of the two distributions is 0."""
        margin = math.log(0.9 / 0.1)
        found = values("exo_pair", margin / 0.1, 0.0, beta=0.1, label_smoothing=0.1)
        assert found == pytest.approx([0.0, 0.0, 0.0], abs=1e-16)

    def test_exo_pair(self):
        """At z = 0, q = 1/2: half of log(0.5 / 0.9) + log(0.5 / 0.1); slope -log(9) / 4."""
        loss, d_chosen, _ = values("exo_pair", 0.0, 0.0, beta=1.0, label_smoothing=0.1)
        assert loss == pytest.approx(0.5 * (math.log(0.5 / 0.9) + math.log(5.0)), rel=1e-14)
        assert d_chosen == pytest.approx(-math.log(9.0) / 4.0, rel=1e-14)

    def test_apo(self):
        """With sigmoid(log 3) = 3/4, and 3/16 as the slope there and at -log 3."""
        three = math.log(3.0)
        found = values("apo_zero", three, -three, beta=1.0)
        assert found == pytest.approx([0.5, -0.1875, 0.1875], rel=1e-14)
        found = values("apo_down", 0.0, -three, beta=1.0)
        assert found == pytest.approx([0.75, 0.25 - 0.1875, 0.1875], rel=1e-14)

    def test_nca_pair_and_bco_pair(self):
        """With sigmoid(log 3) = 3/4: -log is log(4/3), and log(4) for the opposite sign."""
        three, small, large = math.log(3.0), math.log(4.0 / 3.0), math.log(4.0)
        found = values("nca_pair", three, -three, beta=1.0)
        assert found == pytest.approx([1.5 * small + 0.5 * large, 0.125, 0.125], rel=1e-14)
        found = values("bco_pair", three, three, beta=1.0)
        assert found == pytest.approx([small + large, -0.25, 0.75], rel=1e-14)

    def test_sppo_hard(self):
        """(3 - 5)^2 + (-2 + 5)^2."""
        assert values("sppo_hard", 3.0, -2.0, beta=0.1) == pytest.approx([13.0, -4.0, 6.0])

    def test_discopop(self):
        """At z = log 3 and tau = 1, m = 3/4: log(4/3) / 4 + (1/3) (3/4)."""
        loss, d_chosen, _ = values("discopop", math.log(3.0), 0.0, beta=1.0, discopop_tau=1.0)
        small = math.log(4.0 / 3.0)
        assert loss == pytest.approx(0.25 * small + 0.25, rel=1e-14)
        # -sigmoid(-z) (1 - m) - L m', plus the derivative of exp(-z) m = sigmoid(-z).
        assert d_chosen == pytest.approx(-0.0625 - 0.1875 * small - 0.1875, rel=1e-14)

    @pytest.mark.parametrize("tau", [1e-3, 0.05, 1.0])
    def test_discopop_is_finite_where_its_exponential_alone_overflows(self, tau):
        found = values("discopop", -1e4, 0.0, beta=1.0, discopop_tau=tau)
        assert found == [1e4 + (tau == 1.0), -1.0, 1.0]

    def test_simpo(self):
        """z = 2 (-3/2 + 6/4) - 1 + 1 = 0, and then 2 (-1/2 + 6/4) - 1 = 1."""
        found = values("simpo", -3.0, -6.0, ((2, 4),), beta=2.0, simpo_gamma=0.0)
        assert found == pytest.approx([math.log(2.0), -0.5, 0.25], rel=1e-14)
        loss, d_chosen, d_rejected = values("simpo", -1.0, -6.0, ((2, 4),), beta=2.0, simpo_gamma=1)
        assert loss == pytest.approx(math.log1p(math.exp(-1.0)), rel=1e-14)
        assert d_chosen == pytest.approx(-1.0 / (1.0 + math.e), rel=1e-14)
        assert d_rejected == pytest.approx(-d_chosen / 2.0, rel=1e-14)

    def test_alphapo(self):
        """With alpha = 1 and p = 1/2 and 1/4, rewards are 1 - 2 and 1 - 4: z = 2, slopes 1 / p."""
        two = math.log(2.0)
        loss, d_chosen, d_rejected = values(
            "alphapo", -3 * two, -4 * two, ((3, 2),), beta=1.0, alpha=1.0, simpo_gamma=0.0
        )
        slope = -1.0 / (1.0 + math.exp(2.0))
        assert loss == pytest.approx(math.log1p(math.exp(-2.0)), rel=1e-14)
        assert d_chosen == pytest.approx(slope * 2.0 / 3.0, rel=1e-14)
        assert d_rejected == pytest.approx(-slope * 4.0 / 2.0, rel=1e-14)

    def test_orpo(self):
        """Odds 1 and 1/3 (p = 1/2 and 1/4): the ratio is 3, and the sigmoid of its log 3/4."""
        two = math.log(2.0)
        loss, d_chosen, d_rejected = values("orpo", -3 * two, -4 * two, ((3, 2),), beta=0.2)
        assert loss == pytest.approx(0.2 * math.log(4.0 / 3.0), rel=1e-13)
        assert d_chosen == pytest.approx(-0.2 * 0.25 * 2.0 / 3.0, rel=1e-13)
        assert d_rejected == pytest.approx(0.2 * 0.25 * (4.0 / 3.0) / 2.0, rel=1e-13)

    def test_orpo_is_finite_for_certain_answers(self):
        for chosen, rejected in ((0.0, -1.0), (-1.0, 0.0), (0.0, 0.0), (-1e-30, -1e4)):
            assert all(map(math.isfinite, values("orpo", chosen, rejected, beta=0.2)))

    def test_dpop_takes_from_the_margin_what_the_chosen_answer_has_lost(self):
        """z = 0.5 (-0.1 - (-2) - 3 x 0.1) = 0.8; the chosen slope is 1 + 3 times the other."""
        loss, d_chosen, d_rejected = values("dpop", -0.1, -2.0, beta=0.5, dpop_lambda=3.0)
        assert loss == pytest.approx(math.log1p(math.exp(-0.8)), rel=1e-14)
        assert d_rejected == pytest.approx(0.5 / (1.0 + math.exp(0.8)), rel=1e-14)
        assert d_chosen == pytest.approx(-4.0 * d_rejected, rel=1e-14)
        assert values("dpop", 0.1, -2.0, beta=0.5) == values("sigmoid", 0.1, -2.0, beta=0.5)
        assert values("dpop", 0.0, -2.0, beta=0.5) == values("sigmoid", 0.0, -2.0, beta=0.5)

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

    @pytest.mark.parametrize("name", sorted(set(LOSSES) - set(SMOOTHINGS)))
    def test_other_losses_have_no_label_smoothing(self, name):
        with pytest.raises(ValueError, match=f"the {name} loss has none"):
            make_loss(name, label_smoothing=0.1)

    def test_exo_pair_needs_label_smoothing(self):
        with pytest.raises(ValueError, match="exo_pair loss needs one above 0: set it to 1e-3"):
            make_loss("exo_pair")

    @pytest.mark.parametrize(
        ("option", "loss", "wrong"),
        [
            ("discopop_tau", "discopop", (0.0, -0.1, 1.5, math.nan)),
            ("dpop_lambda", "dpop", (-1.0, math.inf, math.nan)),
            ("simpo_gamma", "simpo", (math.inf, math.nan)),
            ("alpha", "alphapo", (math.inf, math.nan)),
        ],
    )
    def test_an_option_of_one_loss(self, option, loss, wrong):
        assert 0.5 in make_loss(loss, **{option: 0.5}).options
        for value in wrong:
            with pytest.raises(ValueError, match=f"{option} is {value}, expected"):
                make_loss(loss, **{option: value})
        with pytest.raises(TypeError, match=f"{option} is '1', expected a number"):
            make_loss(loss, **{option: "1"})
        with pytest.raises(
            ValueError, match=f"{option} is 0.5, but the ipo loss has none: .*{loss}"
        ):
            make_loss("ipo", **{option: 0.5})
        assert loss in LOSS_OPTIONS[option]

    def test_an_option_of_no_loss(self):
        with pytest.raises(TypeError, match="No loss has an option 'gamma'"):
            make_loss("sigmoid", gamma=0.5)

    @pytest.mark.parametrize(
        ("name", "hint"),
        [
            ("sigmod", "Did you mean 'sigmoid'?"),
            ("hnige", "Did you mean 'hinge'?"),
            ("apo-zero", "Did you mean 'apo_zero'?"),
            ("dpo", "Did you mean 'sigmoid'?"),  # not dpop
            ("dpo_norm", "Did you mean 'sigmoid_norm'?"),
            ("atoo", ""),
            ("aot_unpared", "Did you mean 'aot_unpaired'?"),
            ("kto", ""),  # losses of their own
            ("kto_pair", ""),
        ],
    )
    def test_only_a_typo_is_taken_for_a_loss(self, name, hint):
        with pytest.raises(ValueError, match=f"Unknown loss '{name}'") as caught:
            make_loss(name)
        listed = f"The losses are: {', '.join(sorted([*LOSSES, *COUPLED_LOSSES]))}."
        expected = " ".join(filter(None, [f"Unknown loss '{name}'.", hint, listed]))
        assert str(caught.value) == expected

    @pytest.mark.parametrize("value", ["0.1", None, True, torch.tensor(0.1)], ids=str)
    @pytest.mark.parametrize("name", ["beta", "label_smoothing"])
    def test_values_that_are_no_numbers(self, name, value):
        with pytest.raises(TypeError, match=f"{name} is .*, expected a number"):
            make_loss("sigmoid", **{name: value})

    def test_unknown_name(self):
        with pytest.raises(ValueError, match="Did you mean 'sigmoid'"):
            make_loss("sigmod")
        with pytest.raises(ValueError, match=r"The losses are: alphapo, aot, .*, sppo_hard"):
            make_loss("xyz")
        with pytest.raises(ValueError, match=r"Unknown loss \['sigmoid'\]"):
            make_loss(["sigmoid"])


@pytest.mark.parametrize("loss", ONE_OF_EACH, ids=lambda loss: loss.name)
def test_a_run_gone_wrong_shows_in_the_loss(loss):
    nan = torch.tensor([float("nan")]).double()
    one = torch.ones(1).double()
    assert loss.pair_loss(nan, one, torch.ones(1, 2))[0].isnan()
    terms = in_triton(torch.cat([nan, one]), torch.arange(3), torch.zeros(2).double(), loss)
    assert terms.losses.isnan()
