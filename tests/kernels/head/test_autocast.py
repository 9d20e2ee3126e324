"""Precision contexts: autocast, a loss scale, and a buffer for the weight's gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dpofast_kernels import HeadOptions, linear_logps, linear_pair_loss, make_loss
from tests.kernels.head.cases import (
    BACKENDS,
    SHORT_LENGTHS,
    make_inputs,
    options_for,
    relative_error,
    run_logps,
    run_pair_loss,
)

SIGMOID = make_loss("sigmoid", beta=0.3)


def run_both(inputs, options):
    return {
        "pair_loss": run_pair_loss(inputs, SIGMOID, options),
        "logps": run_logps(inputs, options),
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_inputs(backend):
    inputs = make_inputs(torch.float32, bias=True, lengths=SHORT_LENGTHS)
    rounded = inputs.to(torch.bfloat16)
    exact = rounded.to(torch.float64)
    truth = run_both(exact, options_for(exact, "naive"))
    cast = run_both(rounded, options_for(rounded, backend))
    with torch.autocast("cpu", torch.bfloat16):
        found = run_both(inputs, options_for(inputs, backend))
    for op, values in found.items():
        assert torch.equal(values["logps"], cast[op]["logps"])
        for name in ("hidden_states", "weight", "bias"):
            # Gradients that had been rounded to bf16 would be off by 2e-3.
            assert relative_error(values[name], truth[op][name]) <= 1e-5, (op, name)


def test_autocast_of_the_naive_op_casts_the_bias_too():
    inputs = make_inputs(torch.float32, bias=True, lengths=SHORT_LENGTHS)
    rounded = inputs.to(torch.bfloat16)
    expected = run_both(rounded, options_for(rounded, "naive"))
    with torch.autocast("cpu", torch.bfloat16):
        found = run_both(inputs, options_for(inputs, "naive"))
    for op, values in found.items():
        assert torch.equal(values["logps"], expected[op]["logps"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_takes_inputs_of_two_dtypes(backend):
    inputs = make_inputs(torch.float32, lengths=SHORT_LENGTHS)
    mixed = replace(inputs, hidden_states=inputs.to(torch.bfloat16).hidden_states)
    with torch.autocast("cpu", torch.bfloat16):
        expected = run_both(inputs, options_for(inputs, backend))
        found = run_both(mixed, options_for(mixed, backend))
    for op, values in found.items():
        assert torch.equal(values["logps"], expected[op]["logps"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_float64_alone(backend):
    inputs = make_inputs(lengths=SHORT_LENGTHS)
    expected = run_both(inputs, options_for(inputs, backend))
    with torch.autocast("cpu", torch.bfloat16):
        found = run_both(inputs, options_for(inputs, backend))
    for op, values in found.items():
        assert all(torch.equal(values[name], expected[op][name]) for name in values)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["pair_loss", "logps"])
def test_fp16_gradients_wait_for_the_loss_scale(backend, op):
    """Without the scale they are about 1e-9, less than fp16 can represent."""
    inputs = make_inputs(torch.float16, lengths=SHORT_LENGTHS)
    exact = inputs.to(torch.float64)
    scale = 2.0**20
    tiny = make_loss("sigmoid", beta=1e-7)

    def run(leaves, options):
        if op == "pair_loss":
            return run_pair_loss(leaves, tiny, options, upstream=scale)
        logps = linear_logps(leaves.hidden_states, leaves.weight, leaves.labels, options)
        (logps * 1e-7 * scale).sum().backward()
        return {"hidden_states": leaves.hidden_states.grad, "weight": leaves.weight.grad}

    truth = run(exact, options_for(exact, "naive"))
    found = run(inputs, options_for(inputs, backend))
    for name in ("hidden_states", "weight"):
        assert relative_error(found[name].double(), truth[name]) <= 2e-3, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_weight_grad_is_added_to(backend, dtype):
    inputs = make_inputs(dtype, lengths=SHORT_LENGTHS)
    exact = inputs.to(torch.float64)
    truth = run_both(exact, options_for(exact, "naive"))
    buffer_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    weight_grad = torch.ones(inputs.weight.shape, dtype=buffer_dtype)
    options = HeadOptions(backend=backend, weight_grad=weight_grad)
    found = run_both(inputs, options)
    assert "weight" not in found["pair_loss"]
    assert "weight" not in found["logps"]
    expected = truth["pair_loss"]["weight"] + truth["logps"]["weight"]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert relative_error(weight_grad.double() - 1.0, expected) <= tolerance


@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_grad_of_a_frozen_head_is_left_alone(backend):
    inputs = make_inputs(torch.float32, lengths=SHORT_LENGTHS)
    inputs.weight.requires_grad_(False)
    weight_grad = torch.zeros(inputs.weight.shape)
    run_both(inputs, HeadOptions(backend=backend, weight_grad=weight_grad))
    assert not weight_grad.any()


def test_a_loss_that_is_not_used_adds_nothing_to_weight_grad():
    inputs = make_inputs(torch.float32, lengths=SHORT_LENGTHS)
    weight_grad = torch.zeros(inputs.weight.shape)
    linear_pair_loss(
        inputs.hidden_states,
        inputs.weight,
        inputs.labels,
        inputs.bounds,
        inputs.ref_logps,
        SIGMOID,
        HeadOptions(weight_grad=weight_grad),
    )
    assert not weight_grad.any()
