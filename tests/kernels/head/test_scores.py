"""linear_scores: the log-probs of linear_logps, and log-sum-exps compared with fp64."""

from __future__ import annotations

import pytest
import torch

from dpofast_kernels import linear_logps, linear_scores
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
    set_chunk_rows,
)


def scores(inputs, options):
    return linear_scores(inputs.hidden_states, inputs.weight, inputs.labels, options)


def plain_logsumexps(inputs, softcap=None, logit_scale=1.0, temperature=1.0):
    """Log-sum-exps by the formula, in fp64."""
    logits = inputs.hidden_states.detach().double() @ inputs.weight.detach().double().T
    if inputs.bias is not None:
        logits = logits + inputs.bias.detach().double()
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.logsumexp(logits / temperature, -1)


@pytest.mark.parametrize("backend", ["naive", *BACKENDS])
@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), 7, 1000])
def test_float64_equals_the_formula(backend, full, rows, monkeypatch):
    options = FULL_OPTIONS if full else {}
    inputs = make_inputs(bias=full, lengths=SHORT_LENGTHS if rows == 1 else LENGTHS)
    set_chunk_rows(monkeypatch, rows)
    found = scores(inputs, options_for(inputs, backend, **options))
    assert found.shape == (2, len(inputs.labels))
    assert not found.requires_grad
    assert relative_error(found[1], plain_logsumexps(inputs, **options)) <= 1e-12


@pytest.mark.parametrize(("backend", "dtype", "full"), PRECISION_CASES)
def test_no_less_exact_than_naive_in_the_same_dtype(backend, dtype, full):
    options = FULL_OPTIONS if full else {}
    inputs = make_inputs(dtype, bias=full, hidden_size=123, vocab_size=1013)
    truth = plain_logsumexps(inputs, **options)
    naive = scores(inputs, options_for(inputs, "naive", **options))
    found = scores(inputs, options_for(inputs, backend, **options))
    assert found.dtype == torch.float32
    allowed = allowed_error(relative_error(naive[1].double(), truth), dtype)
    assert relative_error(found[1].double(), truth) <= allowed


@pytest.mark.parametrize("backend", ["naive", *BACKENDS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_log_probs_are_bit_for_bit_those_of_linear_logps(backend, dtype):
    inputs = make_inputs(dtype, bias=True, lengths=SHORT_LENGTHS)
    options = options_for(inputs, backend, **FULL_OPTIONS)
    expected = linear_logps(inputs.hidden_states, inputs.weight, inputs.labels, options)
    assert torch.equal(scores(inputs, options)[0], expected.detach())


@pytest.mark.parametrize("backend", ["naive", *BACKENDS])
def test_a_label_that_a_bias_rules_out(backend):
    """Its log-prob is -inf, and the log-sum-exp is that of the other tokens."""
    inputs = make_inputs(bias=True)
    with torch.no_grad():
        inputs.bias[inputs.labels[3]] = float("-inf")
    logps, logsumexps = scores(inputs, options_for(inputs, backend))
    assert logps[3] == float("-inf")
    assert relative_error(logsumexps, plain_logsumexps(inputs)) <= 1e-12


@pytest.mark.parametrize("backend", ["naive", *BACKENDS])
@pytest.mark.parametrize("spread", [1e-3, 60.0])
def test_unlikely_and_certain_labels(backend, spread):
    """The log-sum-exp stays exact if the label's log-prob is hundreds of nats."""
    inputs = make_inputs(torch.float32, spread=spread, lengths=(7, 5))
    truth = plain_logsumexps(inputs)
    logits = inputs.hidden_states.detach().double() @ inputs.weight.detach().double().T
    inputs.labels = torch.where(
        torch.arange(len(logits)) % 2 == 0, logits.argmin(-1), logits.argmax(-1)
    )
    found = scores(inputs, options_for(inputs, backend))
    assert ((found[1] - truth).abs() <= 1e-5 * (1 + truth.abs())).all()


@pytest.mark.parametrize("backend", ["naive", *BACKENDS])
def test_no_rows(backend):
    inputs = make_inputs(lengths=(0, 0))
    assert scores(inputs, options_for(inputs, backend)).shape == (2, 0)
