"""WPO's weights of pairs, and statistics summed over sequences, in the pass of the pair loss."""

from __future__ import annotations

import math

import pytest
import torch

from dpofast_kernels import (
    STATISTICS,
    PairExtras,
    PairWeighting,
    linear_pair_loss,
    linear_statistics,
)
from tests.kernels.head.cases import (
    BACKENDS,
    LENGTHS,
    count_scored_rows,
    make_inputs,
    options_for,
    relative_error,
    run_pair_loss,
    set_chunk_rows,
)
from tests.kernels.head.test_pairs import (
    COEFFICIENTS,
    LOSSES,
    PAIRS,
    WEIGHTS,
    assert_same,
    by_hand,
    doubles,
    token_weights,
)

IN_TURN = torch.arange(6).view(-1, 2)
SWAPPED = torch.tensor([[1, 0], [2, 3], [5, 4]])


def plain_weights(inputs, pairs, clamp=None):
    """[P] w_w w_l by equation 2 of WPO's paper, from all logits, one token at a time."""
    logits = inputs.hidden_states.detach() @ inputs.weight.detach().T
    if inputs.bias is not None:
        logits = logits + inputs.bias.detach()
    p = logits.softmax(-1)
    answers = []
    for start, end in zip(inputs.bounds[:-1], inputs.bounds[1:], strict=True):
        terms = [
            math.log(p[row, inputs.labels[row]]) - math.log(p[row].square().sum())
            for row in range(int(start), int(end))
        ]
        answers.append(math.exp(sum(terms) / len(terms)))
    found = [answers[chosen] * answers[rejected] for chosen, rejected in pairs.tolist()]
    return doubles(*(found if clamp is None else (min(each, clamp) for each in found)))


def outputs(inputs, loss, backend, **extras):
    return linear_pair_loss(
        *(inputs.hidden_states, inputs.weight, inputs.labels, inputs.bounds, inputs.ref_logps),
        *(loss, options_for(inputs, backend), PairExtras(**extras)),
    )


CASES = [
    (backend, name, rows)
    for backend in ("naive", *BACKENDS)
    for name in LOSSES
    for rows in (3, 9, 40)
    if backend == "torch" or (name, rows) == ("apo_zero", 9)
]


@pytest.mark.parametrize(("backend", "name", "rows"), CASES)
def test_weighted_losses_of_sequences_in_several_pairs(backend, name, rows, monkeypatch):
    inputs, loss = make_inputs(bias=True), LOSSES[name]
    weights = WEIGHTS * plain_weights(inputs, PAIRS)
    expected = by_hand(inputs, loss, PAIRS, weights, None, COEFFICIENTS)
    set_chunk_rows(monkeypatch, rows)
    found = run_pair_loss(
        *(inputs, loss, options_for(inputs, backend)),
        pairs=PAIRS,
        weights=WEIGHTS,
        coefficients=COEFFICIENTS,
        weighting=PairWeighting(),
    )
    assert_same(found, expected)


@pytest.mark.parametrize("rows", [1, 5, 13, 40])
@pytest.mark.parametrize("pairs", [None, SWAPPED], ids=["in turn", "swapped"])
@pytest.mark.parametrize("name", LOSSES)
def test_long_pairs(name, pairs, rows, monkeypatch):
    """The tokens' own weights don't count in WPO's."""
    inputs, loss = make_inputs(bias=True), LOSSES[name]
    given = IN_TURN if pairs is None else pairs
    tokens = token_weights(len(inputs.labels))
    weights = plain_weights(inputs, given)
    expected = by_hand(inputs, loss, given, weights, None, None, tokens)
    set_chunk_rows(monkeypatch, rows)
    found = run_pair_loss(
        *(inputs, loss, options_for(inputs, "torch")),
        pairs=pairs,
        token_weights=tokens,
        weighting=PairWeighting(),
    )
    assert_same(found, expected)


# In chunks of 5, two pairs are long, and 10 rows of each aren't in its last piece. Through the
# weight, an answer's slope depends on the other answer, but a fixed ratio stays fixed.
@pytest.mark.parametrize(
    ("name", "rows", "again"),
    [("sigmoid", 5, 10), ("apo_zero", 5, 20), ("sigmoid", 40, 0), ("apo_zero", 40, 0)],
)
def test_which_logits_of_weighted_pairs_are_computed_again(name, rows, again, monkeypatch):
    inputs = make_inputs()
    set_chunk_rows(monkeypatch, rows)
    scored = count_scored_rows(monkeypatch)
    extras = {"weighting": PairWeighting(), "statistics": STATISTICS}
    run_pair_loss(inputs, LOSSES[name], options_for(inputs, "torch"), **extras)
    assert sum(scored) == sum(LENGTHS) + again


@pytest.mark.parametrize("clamp", [None, 1.0, 1e-3])
def test_the_clamp(clamp):
    """Labels of high probability, whose weights lie on both sides of the clamp."""
    inputs = make_inputs(lengths=(2, 1, 3, 2))
    inputs.labels[:3] = (inputs.hidden_states @ inputs.weight.T).argmax(-1)[:3]
    pairs = torch.arange(4).view(-1, 2)
    free, expected = plain_weights(inputs, pairs), plain_weights(inputs, pairs, clamp)
    assert free[0] > 1.0 > free[1]
    output = outputs(inputs, LOSSES["sigmoid"], "torch", weighting=PairWeighting(clamp))
    assert relative_error(output.pair_weights, expected) <= 1e-12
    assert not output.pair_weights.requires_grad


@pytest.mark.parametrize(
    ("backend", "rows"),
    [("naive", 40), ("torch", 5), ("torch", 40), ("triton", 40), ("triton_fused", 40)],
)
def test_sums_of_statistics(backend, rows, monkeypatch):
    """Sequences in no pair have sums, too; token weights don't count."""
    inputs = make_inputs(lengths=(2, 1, 4, 2, 3, 1), bias=True)
    set_chunk_rows(monkeypatch, rows)
    per_row = linear_statistics(
        *(inputs.hidden_states, inputs.weight, inputs.labels),
        options=options_for(inputs, "naive"),
    )
    expected = torch.stack(
        [part.sum(1) for part in per_row.split(inputs.bounds.diff().tolist(), 1)], 1
    )
    names = ("is_top", "entropy", "mean_logit")
    output = outputs(
        *(inputs, LOSSES["sigmoid"], backend),
        statistics=names,
        pairs=torch.tensor([[1, 0], [3, 4]]),
        token_weights=token_weights(len(inputs.labels)),
        weighting=PairWeighting(),
    )
    assert output.statistics.shape == (3, 6)
    assert output.statistics.dtype == torch.float64
    assert not output.statistics.requires_grad
    found = dict(zip(names, output.statistics, strict=True))
    for name, value in zip(STATISTICS, expected, strict=True):
        if name in found:
            torch.testing.assert_close(found[name], value.detach(), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("backend", ["naive", *BACKENDS])
def test_nothing_that_was_not_asked_for(backend):
    inputs = make_inputs(lengths=(2, 1))
    output = outputs(inputs, LOSSES["sigmoid"], backend)
    assert output.statistics is None
    assert output.pair_weights is None
    output = outputs(inputs, LOSSES["sigmoid"], backend, weighting=PairWeighting())
    assert output.statistics is None
    assert output.pair_weights.shape == (1,)


@pytest.mark.parametrize("backend", ["naive", *BACKENDS])
def test_no_pairs(backend):
    inputs = make_inputs(lengths=())
    extras = {"weighting": PairWeighting(), "statistics": ("entropy",)}
    output = outputs(inputs, LOSSES["sigmoid"], backend, **extras)
    assert output.statistics.shape == (1, 0)
    assert output.pair_weights.shape == (0,)
    assert output.loss.item() == 0.0


def test_a_retained_graph_gives_the_same_gradients_again():
    """Without a gradient through the weights: only the first derivative of the loss itself."""
    inputs = make_inputs()
    output = outputs(inputs, LOSSES["sigmoid"], "torch", weighting=PairWeighting())
    (first,) = torch.autograd.grad(output.loss, [inputs.weight], retain_graph=True)
    (second,) = torch.autograd.grad(output.loss, [inputs.weight])
    assert torch.equal(first, second)


def test_half_precision_weights_are_those_of_the_same_inputs():
    """Weights of bf16 inputs, whose logits are kept in fp32, against fp64."""
    inputs = make_inputs(torch.bfloat16)
    expected = plain_weights(inputs.to(torch.float64), IN_TURN)
    output = outputs(inputs, LOSSES["sigmoid"], "torch", weighting=PairWeighting())
    assert relative_error(output.pair_weights, expected) <= 1e-5


def test_extras_of_other_types_are_refused():
    inputs = make_inputs(lengths=(2, 1))
    with pytest.raises(TypeError, match="weighting is a float, expected a PairWeighting or None"):
        outputs(inputs, LOSSES["sigmoid"], "torch", weighting=1.0)
    with pytest.raises(ValueError, match="Unknown statistic 'accuracy' in statistics"):
        outputs(inputs, LOSSES["sigmoid"], "torch", statistics=("accuracy",))


def test_extras_move_to_a_device_with_their_other_options():
    extras = PairExtras(weights=doubles(1.0), weighting=PairWeighting(2.0), statistics=("entropy",))
    moved = extras.to("cpu")
    assert (moved.weighting, moved.statistics) == (extras.weighting, extras.statistics)
