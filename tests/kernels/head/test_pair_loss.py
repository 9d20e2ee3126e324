"""linear_pair_loss: tiled PyTorch and Triton compared with the naive op."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dpofast_kernels import (
    HeadOptions,
    linear_logps,
    linear_pair_loss,
    sum_per_sequence,
)
from dpofast_kernels.head import chunked
from tests.kernels.head.cases import (
    BACKENDS,
    FULL_OPTIONS,
    LOSS_CASES,
    PRECISION_CASES,
    SHORT_LENGTHS,
    SIGMOID,
    allowed_error,
    assert_close,
    make_inputs,
    options_for,
    relative_error,
    run_pair_loss,
)

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
