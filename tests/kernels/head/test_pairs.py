"""Pairs of any sequences, weights, soft labels and coefficients are exact in every back end."""

from __future__ import annotations

import pytest
import torch

from dpofast_kernels import PairExtras, ZeroLoss, linear_pair_loss, make_loss, make_mixture
from dpofast_kernels.head import chunked
from dpofast_kernels.head.naive import naive_linear_logps
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

# One loss of each kind: derivatives of a fixed ratio, of one that lengths decide, each of its own
# answer, and of both answers.
LOSSES = {
    "sigmoid": make_loss("sigmoid", 0.3, 0.1),
    "sigmoid_norm": make_loss("sigmoid_norm", 0.9, 0.2),
    "apo_zero": make_loss("apo_zero", 0.3),
    "apo_down": make_loss("apo_down", 0.3),
    "mixture": make_mixture(["nca_pair", "bco_pair"], [0.8, 0.3], 0.2),
    "zero": ZeroLoss(0.3),
}
SMOOTHED = ("sigmoid", "sigmoid_norm", "robust", "exo_pair")
# Sequences 0 and 5 are in no pair, 1 to 3 in several, 4 is both chosen and rejected.
PAIRS = torch.tensor([[1, 2], [3, 1], [3, 2], [4, 3]])


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


WEIGHTS = doubles(0.5, 2.0, 0.0, 1.0)
COEFFICIENTS = doubles(0.0, -0.3, 0.1, 0.0, -1.0, -0.2)


def token_weights(num_rows):
    return torch.linspace(0.2, 1.0, num_rows, dtype=torch.float64)


def by_hand(inputs, loss, pairs, weights=None, confidence=None, coefficients=None, tokens=None):
    """The same by autograd, pair by pair."""
    logits_logps = naive_linear_logps(
        inputs.hidden_states, inputs.weight, inputs.labels, options_for(inputs, "naive")
    )
    tokens = torch.ones(len(inputs.labels)).double() if tokens is None else tokens
    parts = (logits_logps * tokens).split(inputs.bounds.diff().tolist())
    logps = [part.sum() for part in parts]
    total = torch.zeros((), dtype=torch.float64)
    for index, (chosen, rejected) in enumerate(pairs.tolist()):
        a = (logps[chosen] - inputs.ref_logps[chosen]).view(1)
        b = (logps[rejected] - inputs.ref_logps[rejected]).view(1)
        lengths = inputs.bounds.diff()[[chosen, rejected]].view(1, 2)
        if confidence is None:
            value = loss.pair_loss(a, b, lengths)[0]
        else:
            value = loss.smoothed_loss(a, b, lengths, 1.0 - confidence[index : index + 1])[0]
        total = total + value.sum() * (1.0 if weights is None else weights[index])
    for sequence, logp in enumerate(logps):
        total = total + logp * (0.0 if coefficients is None else coefficients[sequence])
    leaves = [inputs.hidden_states, inputs.weight, *([] if inputs.bias is None else [inputs.bias])]
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    names = ("hidden_states", "weight", "bias")
    return {"loss": total.detach(), "logps": torch.stack(logps).detach()} | {
        name: 1.7 * grad for name, grad in zip(names, grads, strict=False) if grad is not None
    }


def assert_same(found, expected, tolerance=1e-11):
    for name, value in expected.items():
        assert relative_error(found[name], value) <= tolerance, name


CASES = [
    (backend, name, rows)
    for backend in BACKENDS
    for name in LOSSES
    for rows in (3, 9, 40)
    if backend == "torch" or (name, rows) in (("sigmoid", 40), ("apo_down", 9), ("zero", 9))
]


@pytest.mark.parametrize(("backend", "name", "rows"), CASES)
def test_sequences_in_several_pairs(backend, name, rows, monkeypatch):
    """Units have 3, 17 and 12 rows: they fit a chunk, or are longer by one row or by many."""
    inputs, loss = make_inputs(bias=True), LOSSES[name]
    expected = by_hand(inputs, loss, PAIRS, WEIGHTS, None, COEFFICIENTS)
    set_chunk_rows(monkeypatch, rows)
    extras = {"pairs": PAIRS, "weights": WEIGHTS, "coefficients": COEFFICIENTS}
    found = run_pair_loss(inputs, loss, options_for(inputs, backend), **extras)
    assert_same(found, expected)
    naive = run_pair_loss(inputs, loss, options_for(inputs, "naive"), **extras)
    assert_same(naive, expected)
    assert_same(found, {"metrics": naive["metrics"]})


@pytest.mark.parametrize("rows", [1, 5, 13, 40])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_long_pairs_with_all_extras(name, swapped, rows, monkeypatch):
    inputs, loss = make_inputs(bias=True), LOSSES[name]
    pairs = torch.tensor([[1, 0], [2, 3], [5, 4]]) if swapped else torch.arange(6).view(-1, 2)
    tokens, weights = token_weights(len(inputs.labels)), doubles(0.5, 2.0, 1.5)
    expected = by_hand(inputs, loss, pairs, weights, None, COEFFICIENTS, tokens)
    set_chunk_rows(monkeypatch, rows)
    found = run_pair_loss(
        *(inputs, loss, options_for(inputs, "torch")),
        pairs=pairs if swapped else None,
        weights=weights,
        coefficients=COEFFICIENTS,
        token_weights=tokens,
    )
    assert_same(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SMOOTHED)
def test_soft_labels(backend, name):
    inputs = make_inputs(lengths=(3, 1, 4, 5, 2, 2))
    loss, confidence = make_loss(name, 0.3, 0.2), doubles(0.9, 0.55, 0.7)
    pairs = torch.arange(6).view(-1, 2)
    expected = by_hand(inputs, loss, pairs, confidence=confidence)
    found = run_pair_loss(inputs, loss, options_for(inputs, backend), label_confidence=confidence)
    assert_same(found, expected)


@pytest.mark.parametrize("name", SMOOTHED)
def test_soft_labels_equal_label_smoothing(name):
    inputs = make_inputs()
    options = options_for(inputs, "torch")
    expected = run_pair_loss(inputs, make_loss(name, 0.3, 0.2), options)
    confidence = doubles(0.8, 0.8, 0.8)
    loss = make_loss(name, 0.3, 0.1)
    assert_same(run_pair_loss(inputs, loss, options, label_confidence=confidence), expected, 1e-12)


def test_label_confidence_of_a_half_and_below():
    """Half makes the pair's order irrelevant, and 0 turns it round."""
    inputs, loss = make_inputs(lengths=(3, 4)), make_loss("sigmoid", 0.3)
    options = options_for(inputs, "torch")
    half = [
        run_pair_loss(inputs, loss, options, pairs=pairs, label_confidence=doubles(0.5))
        for pairs in (torch.tensor([[0, 1]]), torch.tensor([[1, 0]]))
    ]
    assert_same(half[0], {"loss": half[1]["loss"], "weight": half[1]["weight"]})
    turned = run_pair_loss(inputs, loss, options, label_confidence=doubles(0.0))
    straight = run_pair_loss(inputs, loss, options, pairs=torch.tensor([[1, 0]]))
    assert_same(turned, {"loss": straight["loss"], "weight": straight["weight"]})


@pytest.mark.parametrize("coefficients", [None, COEFFICIENTS])
@pytest.mark.parametrize("name", LOSSES)
def test_long_pairs_are_scored_at_most_twice_without_buffers(name, coefficients, monkeypatch):
    """Pairs of 4, 13 and 14 rows in chunks of 5: two are long."""
    inputs, loss = make_inputs(), LOSSES[name]
    set_chunk_rows(monkeypatch, 5)
    scored, made = count_scored_rows(monkeypatch), []
    new_gradients = chunked.ChunkedHead.new_gradients
    monkeypatch.setattr(
        chunked.ChunkedHead,
        "new_gradients",
        lambda head, *args: made.append(args) or new_gradients(head, *args),
    )
    run_pair_loss(inputs, loss, options_for(inputs, "torch"), coefficients=coefficients)
    again = [10, 10]  # all pieces but the last one, of 3 or of 4 rows
    if loss.is_by_answer:
        again = [4, 8]  # of the answers of 8, 5, 2 and 12 rows, two fit a chunk
    if loss.direction(inputs.bounds.diff().view(-1, 2)) is not None and coefficients is None:
        again[0] = 0
    if name == "zero":
        again = [0, 0]
    assert sum(scored) == sum(LENGTHS) + sum(again)
    assert len(made) == 1


def test_a_group_longer_than_a_chunk_is_scored_twice_but_for_its_last_piece(monkeypatch):
    inputs = make_inputs()
    set_chunk_rows(monkeypatch, 5)
    scored = count_scored_rows(monkeypatch)
    run_pair_loss(inputs, LOSSES["sigmoid"], options_for(inputs, "torch"), pairs=PAIRS)
    # Sequences 0 and 5 are in no pair. The 16 rows of the others are in pieces of 4.
    assert sum(scored) == sum(LENGTHS) + sum(LENGTHS[1:5]) - 4


REFUSED = [
    ({"pairs": torch.tensor([0, 1])}, r"pairs is \[2\] torch.int64, expected \[P, 2\]"),
    ({"pairs": torch.tensor([[0, 6]])}, r"pairs\[0\] is \[0, 6\], expected numbers of the 6"),
    ({"pairs": torch.tensor([[1, 1]])}, r"pairs\[0\] is \[1, 1\], expected two different"),
    ({"pairs": torch.tensor([[2, 3], [0, 1]])}, r"pairs\[1\] is \[0, 1\], after a pair of later"),
    ({"weights": doubles(1.0)}, r"weights is \[1\] torch.float64, expected \[3\]"),
    ({"weights": doubles(1, -1, 1)}, r"weights\[1\] is -1, expected a finite .* least 0"),
    ({"weights": doubles(1, 1, torch.nan)}, r"weights\[2\] is nan, expected a finite"),
    (
        {"label_confidence": doubles(1, 1.5, 0)},
        r"label_confidence\[1\] is 1.5, .* at least 0 and at most 1",
    ),
    ({"coefficients": doubles(1.0)}, r"coefficients is \[1\] torch.float64, expected \[6\]"),
    ({"token_weights": doubles(1.0)}, r"token_weights is \[1\] torch.float64, expected \[31\]"),
]


@pytest.mark.parametrize(("extras", "message"), REFUSED)
def test_wrong_extras_are_refused(extras, message):
    inputs = make_inputs()
    with pytest.raises(ValueError, match=message):
        run_pair_loss(inputs, LOSSES["sigmoid"], options_for(inputs, "torch"), **extras)


def test_soft_labels_are_refused_by_a_loss_without_smoothing():
    inputs = make_inputs()
    with pytest.raises(ValueError, match="the hinge loss has no label smoothing"):
        run_pair_loss(
            *(inputs, make_loss("hinge"), options_for(inputs, "torch")),
            label_confidence=doubles(1, 1, 1),
        )


def test_no_pairs_at_all():
    inputs = make_inputs(lengths=(2, 3, 1))
    coefficients = doubles(-1.0, 0.5, 2.0)
    for backend in ("naive", *BACKENDS):
        output = linear_pair_loss(
            *(inputs.hidden_states, inputs.weight, inputs.labels),
            *(inputs.bounds, inputs.ref_logps, ZeroLoss(), options_for(inputs, backend)),
            PairExtras(pairs=torch.empty(0, 2, dtype=torch.int64), coefficients=coefficients),
        )
        torch.testing.assert_close(output.loss, (coefficients * output.logps).sum())
        assert output.metrics.shape == (8, 0)
