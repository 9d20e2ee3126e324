"""Recurrences and convolutions over packed rows against every sequence by itself, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpofast_kernels.attention import build_layout
from dpofast_kernels.recurrent import RowParts, naive_sequences, shared_convolution, shared_scan
from tests.kernels.recurrent.cases import (
    GROUPS,
    MANY_TAILS,
    UNSHARED,
    WIDTHS,
    convolve,
    delta_inputs,
    delta_rule,
    num_tokens,
)

ROWS = [GROUPS, MANY_TAILS, UNSHARED]
groups_strategy = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple)),
    min_size=1,
    max_size=4,
)


def assert_alike(found, expected, inputs):
    """Outputs and the gradients by all inputs agree; every output has its own upstream gradient."""
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    grads = torch.autograd.grad(found, inputs, upstream)
    expected_grads = torch.autograd.grad(expected, inputs, upstream)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-11)


def compare_convolution(groups, width):
    inputs = torch.randn(1, 3, num_tokens(groups), dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, width, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    parts = RowParts.of(groups)
    found = shared_convolution(lambda row: convolve(row, weight, bias), inputs, width, parts)
    expected = naive_sequences(
        lambda each: convolve(each[0].mT, weight, bias).mT, [inputs.mT], groups
    ).mT
    assert_alike(found, expected, [inputs, weight, bias])


def compare_scan(groups):
    inputs = delta_inputs(num_tokens(groups))
    found = shared_scan(delta_rule, inputs, RowParts.of(groups))
    expected = naive_sequences(lambda each: delta_rule(each)[0], inputs, groups)
    assert_alike(found, expected, inputs)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("groups", ROWS)
def test_a_convolution_equals_that_of_each_sequence(groups, width):
    compare_convolution(groups, width)


@pytest.mark.parametrize("groups", ROWS)
def test_a_scan_equals_that_of_each_sequence(groups):
    compare_scan(groups)


@settings(max_examples=20, deadline=None)
@given(groups_strategy)
def test_any_row(groups):
    compare_convolution(groups, 4)
    compare_scan(groups)


def test_the_parts_of_a_row():
    parts = RowParts.of([(2, (0, 3, 1)), (1, (0,)), (4, (5,))])
    assert parts.lengths == (2, 3, 1, 1, 4, 5)
    assert parts.prefixes == (None, 0, 0, None, None, 4)
    assert parts.continued() == {0, 4}


def test_a_layout_keeps_its_groups():
    layout = build_layout(MANY_TAILS)
    assert layout.groups == MANY_TAILS
    assert layout.to("cpu").groups == MANY_TAILS
    assert sum(RowParts.of(layout.groups).lengths) == layout.num_tokens


def test_a_prefix_runs_once_and_states_are_made_only_for_tails():
    calls = []

    def scan(inputs, initial_state, keeps_state):
        calls.append((inputs[0].shape[1], initial_state is not None, keeps_state))
        return delta_rule(inputs, initial_state, keeps_state)

    shared_scan(scan, delta_inputs(15), RowParts.of([(5, (3, 0, 2)), (4, (0,)), (1, (0, 0))]))
    expected = [(5, False, True), (3, True, False), (2, True, False)]
    assert calls == [*expected, (4, False, False), (1, False, False)]


def test_what_ignores_the_prefix_differs():
    """The comparison would show a state, or inputs, that don't reach the tails."""
    inputs = delta_inputs(num_tokens(GROUPS))
    with pytest.raises(AssertionError):
        assert_alike(
            shared_scan(
                lambda each, _, keeps: delta_rule(each, None, keeps), inputs, RowParts.of(GROUPS)
            ),
            naive_sequences(lambda each: delta_rule(each)[0], inputs, GROUPS),
            inputs,
        )


def test_a_scan_without_a_final_state_is_refused():
    with pytest.raises(ValueError, match="gave no final state"):
        shared_scan(
            lambda inputs, *_: (delta_rule(inputs)[0], None),
            delta_inputs(5),
            RowParts.of([(2, (1, 2))]),
        )
