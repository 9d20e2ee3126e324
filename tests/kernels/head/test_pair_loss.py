"""linear_pair_loss: tiled PyTorch and Triton compared with the naive op."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from dpofast_kernels import (
    HeadOptions,
    PairLoss,
    linear_logps,
    linear_pair_loss,
    make_custom_loss,
    make_loss,
    sum_per_sequence,
)
from dpofast_kernels.head import chunked
from tests.kernels.head.cases import (
    BACKENDS,
    FULL_OPTIONS,
    LENGTHS,
    PRECISION_CASES,
    SHORT_LENGTHS,
    allowed_error,
    make_inputs,
    options_for,
    relative_error,
    run_pair_loss,
    set_chunk_rows,
)

LOSS_CASES = {
    "sigmoid": make_loss("sigmoid", beta=0.3),
    "cdpo": make_loss("sigmoid", beta=0.3, label_smoothing=0.2),
    "hinge": make_loss("hinge", beta=0.3),
    "ipo": make_loss("ipo", beta=0.3),
}
SIGMOID = LOSS_CASES["sigmoid"]


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


def assert_close(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(actual[name], value) <= tolerance, name


NAIVE_CASES = [
    (backend, loss, full)
    for backend in BACKENDS
    for loss in LOSS_CASES
    for full in (False, True)
    if backend == "torch" or full or loss == "sigmoid"  # fewer in the interpreter
]


@pytest.mark.parametrize(("backend", "loss", "full"), NAIVE_CASES)
def test_float64_equals_naive(backend, loss, full):
    inputs, loss = make_inputs(bias=full), LOSS_CASES[loss]
    options = FULL_OPTIONS if full else {}
    expected = run_pair_loss(inputs, loss, options_for(inputs, "naive", **options))
    actual = run_pair_loss(inputs, loss, options_for(inputs, backend, **options))
    assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize(("backend", "dtype", "full"), PRECISION_CASES)
def test_no_less_exact_than_naive_in_the_same_dtype(backend, dtype, full):
    options = FULL_OPTIONS if full else {}
    inputs = make_inputs(dtype, bias=full, hidden_size=123, vocab_size=1013)
    exact = inputs.to(torch.float64)
    truth = run_pair_loss(exact, SIGMOID, options_for(exact, "naive", **options))
    naive = run_pair_loss(inputs, SIGMOID, options_for(inputs, "naive", **options))
    actual = run_pair_loss(inputs, SIGMOID, options_for(inputs, backend, **options))
    for name, value in truth.items():
        if name == "loss" and dtype != torch.float32:
            continue  # a single number, which can be exact by chance in naive; logps decide
        allowed = allowed_error(relative_error(naive[name], value), dtype)
        assert relative_error(actual[name], value) <= allowed, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_of_low_precision_inputs_are_never_rounded(backend, dtype):
    inputs = make_inputs(dtype, spread=6.0, lengths=SHORT_LENGTHS)
    exact = inputs.to(torch.float64)
    truth = run_pair_loss(exact, SIGMOID, options_for(exact, "naive"))
    actual = run_pair_loss(inputs, SIGMOID, options_for(inputs, backend))
    per_token = (actual["logps"] - truth["logps"]).abs() / inputs.bounds.diff()
    assert per_token.max() <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("hidden_size", "vocab_size", "lengths"),
    [
        (1, 2, (1, 1)),
        (63, 507, (1, 1)),
        (64, 512, (3, 4)),
        (7, 5003, (2, 1, 1, 5)),
        (123, 65, (31, 1)),
    ],
)
def test_odd_shapes(backend, hidden_size, vocab_size, lengths):
    inputs = make_inputs(hidden_size=hidden_size, vocab_size=vocab_size, lengths=lengths)
    expected = run_pair_loss(inputs, SIGMOID, options_for(inputs, "naive"))
    assert_close(run_pair_loss(inputs, SIGMOID, options_for(inputs, backend)), expected, 1e-11)


# Pairs have 4, 13 and 14 rows. So some fit a chunk, some are longer, by one row or by many. The
# interpreter is slow: there every loss meets long pairs and a full chunk, and one loss the rest.
CHUNK_CASES = [
    (backend, rows, loss)
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


def test_logits_of_long_pairs_are_computed_once(monkeypatch):
    inputs = make_inputs()
    set_chunk_rows(monkeypatch, 5)
    scored = []
    score = chunked.ChunkedHead.score
    monkeypatch.setattr(
        chunked.ChunkedHead, "score", lambda head, rows: scored.append(rows) or score(head, rows)
    )
    run_pair_loss(inputs, SIGMOID, options_for(inputs, "torch"))
    assert sum(rows.stop - rows.start for rows in scored) == sum(LENGTHS)


@pytest.mark.parametrize(("rows", "weight_grads"), [(30, 1), (13, 1), (5, 2)])
def test_one_long_pair_needs_no_second_gradient_of_the_weight(rows, weight_grads, monkeypatch):
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
    assert len(made) == weight_grads


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


@pytest.mark.parametrize("backend", ["naive", *BACKENDS])
def test_no_pairs_give_zero_and_zero_gradients(backend):
    inputs = make_inputs(lengths=(), bias=True)
    found = run_pair_loss(inputs, SIGMOID, options_for(inputs, backend))
    assert found["loss"] == 0.0
    assert found["logps"].shape == (0,)
    assert found["hidden_states"].shape == (0, 63)
    assert found["weight"].shape == (507, 63)
    assert not found["weight"].any()
    assert not found["bias"].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_logits_stay_finite_and_exact(backend):
    inputs = make_inputs(torch.float32, spread=3000.0, lengths=SHORT_LENGTHS)
    exact = inputs.to(torch.float64)
    truth = run_pair_loss(exact, SIGMOID, options_for(exact, "naive"))
    actual = run_pair_loss(inputs, SIGMOID, options_for(inputs, backend))
    for name, value in truth.items():
        assert actual[name].isfinite().all(), name
        assert relative_error(actual[name], value) <= 1e-3, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_head_does_no_work_for_the_weight(backend, monkeypatch):
    inputs = make_inputs(lengths=SHORT_LENGTHS)
    expected = run_pair_loss(inputs, SIGMOID, options_for(inputs, "naive"))
    inputs.weight.requires_grad_(False)
    monkeypatch.setattr(chunked, "add_weight_grad", None)
    monkeypatch.setattr(chunked, "weight_grad_into", None)
    actual = run_pair_loss(inputs, SIGMOID, options_for(inputs, backend))
    assert relative_error(actual["hidden_states"], expected["hidden_states"]) <= 1e-12
    assert inputs.weight.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_body_does_no_work_for_the_hidden_states(backend, monkeypatch):
    inputs = make_inputs(lengths=SHORT_LENGTHS)
    expected = run_pair_loss(inputs, SIGMOID, options_for(inputs, "naive"))
    inputs.hidden_states.requires_grad_(False)
    monkeypatch.setattr(chunked, "hidden_grad_into", None)
    actual = run_pair_loss(inputs, SIGMOID, options_for(inputs, backend))
    assert relative_error(actual["weight"], expected["weight"]) <= 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_work_under_no_grad(backend, monkeypatch):
    inputs = make_inputs()
    monkeypatch.setattr(chunked.ChunkedHead, "add_gradients", None)
    with torch.no_grad():
        output = linear_pair_loss(
            inputs.hidden_states,
            inputs.weight,
            inputs.labels,
            inputs.bounds,
            inputs.ref_logps,
            SIGMOID,
            options_for(inputs, backend),
        )
    assert not output.loss.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_log_probs_as_linear_logps_bit_for_bit(backend):
    inputs = make_inputs(torch.float32)
    options = options_for(inputs, backend)
    per_token_logps = linear_logps(inputs.hidden_states, inputs.weight, inputs.labels, options)
    found = run_pair_loss(inputs, SIGMOID, options)
    summed = sum_per_sequence(per_token_logps, inputs.bounds)
    if backend == "torch":
        assert torch.equal(found["logps"], summed)
    assert relative_error(found["logps"], summed) <= 1e-14


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_bit_for_bit(backend):
    inputs = make_inputs(torch.float32, bias=True)
    first = run_pair_loss(inputs, SIGMOID, options_for(inputs, backend))
    second = run_pair_loss(inputs, SIGMOID, options_for(inputs, backend))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_retained_graph_gives_the_gradients_again():
    inputs = make_inputs()
    output = linear_pair_loss(
        inputs.hidden_states,
        inputs.weight,
        inputs.labels,
        inputs.bounds,
        inputs.ref_logps,
        SIGMOID,
        options_for(inputs, "torch"),
    )
    leaves = (inputs.hidden_states, inputs.weight)
    found = torch.autograd.grad(2.0 * output.loss, leaves, retain_graph=True)
    first = [gradient.clone() for gradient in found]
    again = torch.autograd.grad(3.0 * output.loss, leaves)
    for before, after in zip(first, again, strict=True):
        assert relative_error(after, 1.5 * before) <= 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    inputs = make_inputs(hidden_size=5, vocab_size=11, lengths=(2, 3), bias=True)

    def loss(hidden_states, weight, bias):
        options = HeadOptions(bias=bias, backend=backend, **FULL_OPTIONS)
        return linear_pair_loss(
            hidden_states, weight, inputs.labels, inputs.bounds, inputs.ref_logps, SIGMOID, options
        ).loss

    leaves = (inputs.hidden_states, inputs.weight, inputs.bias)
    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)


def test_inputs_that_are_not_contiguous():
    inputs = make_inputs()
    expected = run_pair_loss(inputs, SIGMOID, options_for(inputs, "naive"))
    strided = replace(
        inputs,
        hidden_states=inputs.hidden_states.detach().t().contiguous().t().requires_grad_(),
        weight=inputs.weight.detach().t().contiguous().t().requires_grad_(),
        labels=inputs.labels.repeat_interleave(2)[::2],
    )
    for backend in ("torch", "triton"):
        found = run_pair_loss(strided, SIGMOID, options_for(strided, backend))
        assert_close(found, expected, 1e-12)
    with pytest.raises(ValueError, match=r"weight has strides \(1, 507\).*'triton_fused' expects"):
        run_pair_loss(strided, SIGMOID, options_for(strided, "triton_fused"))
    strided = replace(strided, weight=inputs.weight)
    found = run_pair_loss(strided, SIGMOID, options_for(strided, "triton_fused"))
    assert_close(found, expected, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_that_are_slices_of_larger_ones(backend):
    """Unaligned rows with gaps between them, and every other number of the vectors."""
    inputs = make_inputs(bias=True, hidden_size=16, vocab_size=130, lengths=(3, 4))
    expected = run_pair_loss(inputs, SIGMOID, options_for(inputs, "naive"))

    def spread(tensor, *places):
        larger = tensor.new_full([2 * size + 10 for size in tensor.shape], 77)
        larger[places] = tensor.detach()
        return larger[places].requires_grad_(tensor.requires_grad)

    sliced = replace(
        inputs,
        hidden_states=spread(inputs.hidden_states, slice(7), slice(3, 19)),
        weight=spread(inputs.weight, slice(130), slice(7, 23)),
        bias=spread(inputs.bias, slice(0, 260, 2)),
        labels=spread(inputs.labels, slice(0, 14, 2)),
        bounds=spread(inputs.bounds, slice(0, 6, 2)),
        ref_logps=spread(inputs.ref_logps, slice(0, 4, 2)),
    )
    assert not sliced.weight.is_contiguous()
    assert sliced.ref_logps.stride() == (2,)
    assert_close(run_pair_loss(sliced, SIGMOID, options_for(sliced, backend)), expected, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_label_that_a_bias_rules_out(backend):
    """Its log-prob is -inf; the other rows and all gradients are as usual."""
    inputs = make_inputs(bias=True, hidden_size=16, vocab_size=600, lengths=(3, 4))
    unscored = next(token for token in range(600) if token not in inputs.labels)
    inputs.bias.data[[int(inputs.labels[2]), unscored]] = float("-inf")

    def run(backend):
        options = options_for(inputs, backend)
        logps = linear_logps(inputs.hidden_states, inputs.weight, inputs.labels, options)
        leaves = (inputs.hidden_states, inputs.weight, inputs.bias)
        return logps, torch.autograd.grad(logps, leaves, torch.ones_like(logps))

    logps, found = run(backend)
    expected_logps, expected = run("naive")
    assert expected_logps.isinf().tolist() == [row == 2 for row in range(7)]
    torch.testing.assert_close(logps, expected_logps, rtol=1e-12, atol=0.0)
    for gradient, exact in zip(found, expected, strict=True):
        assert relative_error(gradient, exact) <= 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_that_a_bias_rules_out(backend):
    """Whole blocks of the vocabulary are -inf."""
    inputs = make_inputs(bias=True, vocab_size=1200, lengths=SHORT_LENGTHS)
    with torch.no_grad():
        inputs.bias[:1100] = float("-inf")
    inputs.bias.requires_grad_(False)
    inputs.labels.clamp_(min=1100)
    expected = run_pair_loss(inputs, SIGMOID, options_for(inputs, "naive"))
    assert expected["logps"].isfinite().all()
    assert_close(run_pair_loss(inputs, SIGMOID, options_for(inputs, backend)), expected, 1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_smaller_workspace_changes_nothing(backend):
    inputs = make_inputs(bias=True)
    expected = run_pair_loss(inputs, SIGMOID, options_for(inputs, "naive"))
    options = replace(options_for(inputs, backend), workspace_bytes=8 * 512 * 5)
    assert_close(run_pair_loss(inputs, SIGMOID, options), expected, 1e-12)


def test_labels_overwritten_before_the_backward_are_noticed():
    inputs = make_inputs()
    logps = linear_logps(inputs.hidden_states, inputs.weight, inputs.labels)
    inputs.labels.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()
