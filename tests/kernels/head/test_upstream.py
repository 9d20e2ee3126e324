"""An upstream gradient known beforehand: the same gradients, and dW rounded once, at once."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from dpofast_kernels import Answers, linear_sequence_loss, make_unpaired_loss
from dpofast_kernels.head import chunked
from dpofast_kernels.head.rescale import rescale
from tests.kernels.head.cases import (
    BACKENDS,
    SHORT_LENGTHS,
    SIGMOID,
    assert_close,
    gradients,
    make_inputs,
    options_for,
    relative_error,
    run_logps,
    run_pair_loss,
    set_chunk_rows,
)


@pytest.fixture
def weight_grads(monkeypatch):
    """A list of the dtypes that the weight's gradient is made in."""
    dtypes = []
    made = chunked.ChunkedHead.new_gradients

    def noted(head, *args):
        found = made(head, *args)
        dtypes.append(None if found.weight is None else found.weight.dtype)
        return found

    monkeypatch.setattr(chunked.ChunkedHead, "new_gradients", noted)
    return dtypes


UPSTREAM_CASES = [  # with chunks of 5 rows, two pairs are longer than a chunk
    *(("torch", rows, upstream) for rows in (5, 30) for upstream in (1.7, 0.25, 1.0)),
    *(pytest.param(name, 5, 0.25, marks=pytest.mark.slow) for name in BACKENDS[1:]),
]


@pytest.mark.parametrize(("backend", "rows", "upstream"), UPSTREAM_CASES)
def test_the_gradients_are_those_of_the_real_upstream_gradient(
    backend, rows, upstream, monkeypatch
):
    """The real one is 1.7. What the caller expects changes neither loss nor gradients."""
    inputs = make_inputs(bias=True)
    expected = run_pair_loss(inputs, SIGMOID, options_for(inputs, "naive"))
    set_chunk_rows(monkeypatch, rows)
    options = options_for(inputs, backend, upstream=upstream)
    assert_close(run_pair_loss(inputs, SIGMOID, options), expected, 1e-12)


@pytest.mark.parametrize("upstream", [0.3, None])
def test_single_answers(upstream):
    found = []
    for backend in ("naive", "torch"):
        inputs = make_inputs()
        desirable = torch.arange(len(inputs.ref_logps)) % 2 == 0
        answers = Answers(inputs.bounds, inputs.ref_logps, desirable)
        options = options_for(inputs, backend, upstream=upstream)
        output = linear_sequence_loss(
            *(inputs.hidden_states, inputs.weight, inputs.labels, answers),
            *(make_unpaired_loss("kto", beta=0.1), options),
        )
        (0.3 * output.loss).backward()
        found.append({"loss": output.loss.detach(), **gradients(inputs)})
    assert_close(found[1], found[0], 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_chunk_rounds_the_weight_gradient_once(backend, weight_grads):
    inputs = make_inputs(torch.bfloat16, lengths=SHORT_LENGTHS)
    summed = run_pair_loss(inputs, SIGMOID, options_for(inputs, backend))
    options = options_for(inputs, backend, upstream=1.7)
    rounded = run_pair_loss(inputs, SIGMOID, options)
    assert weight_grads == [torch.float32, torch.bfloat16]
    assert relative_error(rounded["weight"], summed["weight"]) <= 3e-3
    again = run_pair_loss(inputs, SIGMOID, options)
    assert all(torch.equal(rounded[name], again[name]) for name in rounded)


@pytest.mark.parametrize("upstream", [1.7, 1 / 3])
def test_a_rounded_weight_gradient_is_no_less_exact_than_that_of_naive(upstream):
    squares = Counter()
    for seed in range(4):
        inputs = make_inputs(torch.bfloat16, lengths=(3 + seed, 5) * 8, seed=seed)
        exact = inputs.to(torch.float64)
        truth = run_pair_loss(exact, SIGMOID, options_for(exact, "naive"), upstream)
        for backend in ("torch", "naive"):
            options = options_for(inputs, backend, upstream=upstream)
            found = run_pair_loss(inputs, SIGMOID, options, upstream)
            for name in ("hidden_states", "weight"):
                squares[backend, name] += relative_error(found[name], truth[name]) ** 2
    for name in ("hidden_states", "weight"):
        assert squares["torch", name] <= squares["naive", name], name


@pytest.mark.parametrize(
    ("dtype", "rows", "options", "expected"),
    [
        (torch.bfloat16, 14, {"upstream": 1.7}, torch.float32),  # several chunks
        (torch.bfloat16, 40, {}, torch.float32),  # nothing is known
        (torch.float16, 40, {"upstream": 1.7}, torch.float32),  # a loss scale may be missing
        (torch.float32, 40, {"upstream": 1.7}, torch.float32),
        (torch.bfloat16, 40, {"upstream": 1.7}, torch.bfloat16),
    ],
)
def test_when_the_weight_gradient_is_summed(
    dtype, rows, options, expected, weight_grads, monkeypatch
):
    inputs = make_inputs(dtype)
    set_chunk_rows(monkeypatch, rows)
    run_pair_loss(inputs, SIGMOID, options_for(inputs, "torch", **options))
    assert weight_grads == [expected]


def test_a_buffer_of_the_caller_gets_the_sum_in_float32(weight_grads):
    inputs = make_inputs(torch.bfloat16)
    plain = run_pair_loss(inputs, SIGMOID, options_for(inputs, "torch"))
    buffer = torch.ones(507, 63)
    options = replace(options_for(inputs, "torch", upstream=1.7), weight_grad=buffer)
    run_pair_loss(inputs, SIGMOID, options)
    assert weight_grads == [torch.float32, torch.float32]
    assert relative_error((buffer - 1.0).double(), plain["weight"]) <= 3e-3


def test_log_probs_know_their_upstream_gradient(weight_grads, monkeypatch):
    inputs = make_inputs(torch.bfloat16)
    exact = inputs.to(torch.float64)
    truth = run_logps(exact, options_for(exact, "naive"))
    found = [run_logps(inputs, options_for(inputs, "torch"))]
    set_chunk_rows(monkeypatch, 14)
    found.append(run_logps(inputs, options_for(inputs, "torch")))
    assert weight_grads == [torch.bfloat16, torch.float32]
    for each in found:
        assert relative_error(each["weight"], truth["weight"]) <= 3e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_rescale_equals_its_kernel(dtype):
    from dpofast_kernels.head.rescale_triton import rescale_fwd

    gradient = torch.randn(3, 4099).to(dtype)
    exact = torch.promote_types(dtype, torch.float32)
    for factor in (1.0, 2.0, -0.25):  # exact, as the interpreter cuts digits off
        number = torch.tensor(factor, dtype=torch.float64)
        expected = gradient * factor
        assert torch.equal(rescale(gradient.clone(), number), expected)
        assert torch.equal(rescale_fwd(gradient.clone(), number.to(exact)), expected)
