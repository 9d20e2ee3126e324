"""linear_pair_loss where chunks are cut, with losses of every kind: long pairs, losses by hand."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from dpofast_kernels import (
    LOSSES,
    DivergenceLoss,
    PairLoss,
    linear_pair_loss,
    make_custom_loss,
    make_loss,
    make_mixture,
)
from dpofast_kernels.head import chunked
from tests.kernels.head.cases import (
    BACKENDS,
    LENGTHS,
    LOSS_CASES,
    SHORT_LENGTHS,
    SIGMOID,
    assert_close,
    count_scored_rows,
    make_inputs,
    options_for,
    run_pair_loss,
    set_chunk_rows,
)


@dataclass(frozen=True)
class UnevenLoss(PairLoss):
    """A loss whose two derivatives have no fixed ratio: a long pair takes two passes."""

    name = "uneven"

    def pair_loss(self, chosen_logratios, rejected_logratios, lengths):
        loss = self.beta * (chosen_logratios.square() - rejected_logratios.exp())
        return loss, 2.0 * self.beta * chosen_logratios, -self.beta * rejected_logratios.exp()


@dataclass(frozen=True)
class OneSidedLoss(PairLoss):
    """A loss of one side's log-ratio: the derivative of the other side is 0."""

    name = "one-sided"
    side: int = 0

    def pair_loss(self, chosen_logratios, rejected_logratios, lengths):
        logratios = (chosen_logratios, rejected_logratios)[self.side]
        slopes = [torch.zeros_like(logratios), torch.zeros_like(logratios)]
        slopes[self.side] = 2.0 * self.beta * logratios
        return self.beta * logratios.square(), *slopes

    def direction(self, lengths):
        return torch.eye(2, dtype=torch.float64)[self.side].expand(len(lengths), 2)


# Pairs have 4, 13 and 14 rows. So some fit a chunk, some are longer, by one row or by many. The
# interpreter is slow: there every loss meets long pairs and a full chunk, and one loss the rest.
CHUNK_CASES = [
    pytest.param(
        *(backend, rows, loss),
        marks=[pytest.mark.slow] * (backend != "torch" and (rows == 14 or loss != "sigmoid")),
    )
    for backend in BACKENDS
    for loss in LOSS_CASES
    for rows in (1, 5, 12, 14, 30)
    if backend == "torch" or loss == "sigmoid" or rows in (5, 14)
]


@pytest.mark.parametrize(("backend", "rows", "loss"), CHUNK_CASES)
def test_chunks_change_nothing(backend, rows, loss, monkeypatch):
    loss = LOSS_CASES[loss]
    inputs = make_inputs(bias=True, lengths=SHORT_LENGTHS if rows == 1 else LENGTHS)
    expected = run_pair_loss(inputs, loss, options_for(inputs, "naive", softcap=5.0))
    set_chunk_rows(monkeypatch, rows)
    actual = run_pair_loss(inputs, loss, options_for(inputs, backend, softcap=5.0))
    assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize("rows", [5, 30])
def test_long_pair_of_a_loss_without_direction(rows, monkeypatch):
    inputs, loss = make_inputs(bias=True), UnevenLoss(beta=0.2)
    assert loss.direction(inputs.bounds.diff().view(-1, 2)) is None
    expected = run_pair_loss(inputs, loss, options_for(inputs, "naive"))
    set_chunk_rows(monkeypatch, rows)
    assert_close(run_pair_loss(inputs, loss, options_for(inputs, "torch")), expected, 1e-12)


@pytest.mark.parametrize("side", [0, 1])
def test_long_pair_of_a_loss_of_one_side(side, monkeypatch):
    inputs, loss = make_inputs(bias=True), OneSidedLoss(beta=0.2, side=side)
    expected = run_pair_loss(inputs, loss, options_for(inputs, "naive"))
    set_chunk_rows(monkeypatch, 5)
    assert_close(run_pair_loss(inputs, loss, options_for(inputs, "torch")), expected, 1e-12)


EVERY_LOSS = [make_loss(name, 0.3, 0.1 if name == "exo_pair" else 0.0) for name in LOSSES]
EVERY_LOSS += [
    make_mixture(["sigmoid", "bco_pair"], [0.8, 0.2], 0.3),
    DivergenceLoss(beta=0.3, loss=SIGMOID, divergence="js_divergence"),
    make_custom_loss(lambda chosen, rejected, lengths: chosen.square() - rejected, beta=0.3),
]


@pytest.mark.parametrize("loss", EVERY_LOSS, ids=lambda loss: "+".join(loss.names))
def test_logits_of_pairs_that_fit_are_computed_once(loss, monkeypatch):
    inputs = make_inputs(hidden_size=8, vocab_size=20)
    set_chunk_rows(monkeypatch, 30)
    scored = count_scored_rows(monkeypatch)
    run_pair_loss(inputs, loss, options_for(inputs, "torch"))
    assert sum(scored) == sum(LENGTHS)


@pytest.mark.parametrize("loss", EVERY_LOSS, ids=lambda loss: "+".join(loss.names))
def test_logits_of_a_long_pair_are_computed_at_most_twice(loss, monkeypatch):
    """Pairs of 4, 13 and 14 rows. The first long one is computed once if its derivatives have a
    fixed ratio. The last piece of each run whose loss is known apart is computed once, too."""
    inputs = make_inputs(hidden_size=8, vocab_size=20)
    set_chunk_rows(monkeypatch, 5)
    scored = count_scored_rows(monkeypatch)
    run_pair_loss(inputs, loss, options_for(inputs, "torch"))
    again = [10, 10]  # pieces of 5, 5 and 3, or 5, 5 and 4 rows
    if loss.is_by_answer:
        again = [4, 8]  # 8 and 5 rows in pieces of 4, 4 and 5; 2 and 12 rows in 2 and 4, 4, 4
    if loss.direction(inputs.bounds.diff().view(-1, 2)) is not None:
        again[0] = 0
    assert sum(scored) == sum(LENGTHS) + sum(again)


@pytest.mark.parametrize("rows", [30, 13, 5])
def test_long_pairs_need_no_second_gradient_of_the_weight(rows, monkeypatch):
    """Pairs of 4, 13 and 14 rows: none, one, or two are longer than a chunk."""
    inputs = make_inputs(bias=True)
    set_chunk_rows(monkeypatch, rows)
    made = []
    new_gradients = chunked.ChunkedHead.new_gradients
    monkeypatch.setattr(
        chunked.ChunkedHead,
        "new_gradients",
        lambda head, *args: made.append(args) or new_gradients(head, *args),
    )
    run_pair_loss(inputs, SIGMOID, options_for(inputs, "torch"))
    assert len(made) == 1


@dataclass(frozen=True)
class SignedSigmoid(type(SIGMOID)):
    """A subclass keeps the name of its base, but Triton's formula of the base isn't its own."""

    def pair_loss(self, chosen_logratios, rejected_logratios, lengths):
        loss, *slopes = super().pair_loss(-chosen_logratios, -rejected_logratios, lengths)
        return loss, *(-slope for slope in slopes)


def by_hand(chosen_logratios, rejected_logratios, lengths):
    return torch.log1p(torch.exp(-SIGMOID.beta * (chosen_logratios - rejected_logratios)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", [UnevenLoss(), SignedSigmoid(0.3)], ids=["uneven", "subclass"])
def test_a_loss_without_a_formula_in_triton(backend, loss):
    inputs = make_inputs()
    expected = run_pair_loss(inputs, loss, options_for(inputs, "naive"))
    assert_close(run_pair_loss(inputs, loss, options_for(inputs, backend)), expected, 1e-12)


@pytest.mark.parametrize("rows", [5, 30])  # pairs longer than a chunk, and pairs that fit
@pytest.mark.parametrize("backend", ["naive", *BACKENDS])
def test_the_sigmoid_written_by_hand_is_the_built_in(backend, rows, monkeypatch):
    inputs, options = make_inputs(bias=True), {"softcap": 5.0}
    expected = run_pair_loss(inputs, SIGMOID, options_for(inputs, "torch", **options))
    set_chunk_rows(monkeypatch, rows)
    own = make_custom_loss(by_hand, beta=SIGMOID.beta)
    actual = run_pair_loss(inputs, own, options_for(inputs, backend, **options))
    assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_by_hand_is_computed_in_float64_under_autocast_and_without_gradients(backend):
    inputs = make_inputs(torch.bfloat16, lengths=SHORT_LENGTHS)
    own, options = make_custom_loss(by_hand, beta=SIGMOID.beta), options_for(inputs, backend)

    def loss_of(loss):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            return linear_pair_loss(
                inputs.hidden_states,
                inputs.weight,
                inputs.labels,
                inputs.bounds,
                inputs.ref_logps,
                loss,
                options,
            ).loss

    torch.testing.assert_close(loss_of(own), loss_of(SIGMOID), rtol=1e-12, atol=0)
