"""Recurrences by kernels for many sequences against every sequence by itself, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from dpofast_kernels.recurrent import RowParts, naive_sequences, shared_scan, shared_varlen_scan
from tests.kernels.recurrent.cases import (
    GROUPS,
    MANY_TAILS,
    UNSHARED,
    delta_inputs,
    delta_rule,
    num_tokens,
)
from tests.kernels.recurrent.test_recurrent import assert_alike, groups_strategy


class Varlen:
    """The delta rule of many sequences in one row, and the bounds of each call."""

    def __init__(self):
        self.bounds = []

    def __call__(self, inputs, initial_states, bounds, keeps_states):
        assert bounds.dtype == torch.int64
        self.bounds.append(bounds)
        outputs, states = [], []
        for number, (start, end) in enumerate(torch.stack([bounds[:-1], bounds[1:]], 1).tolist()):
            assert start < end
            state = None if initial_states is None else initial_states[number : number + 1]
            output, state = delta_rule([each[:, start:end] for each in inputs], state, keeps_states)
            outputs.append(output)
            states.append(state)
        return torch.cat(outputs, 1), torch.cat(states) if keeps_states else None


def compare(groups):
    inputs = delta_inputs(num_tokens(groups))
    scan = Varlen()
    found = shared_varlen_scan(scan, inputs, RowParts.of(groups))
    expected = naive_sequences(lambda each: delta_rule(each)[0], inputs, groups)
    assert_alike(found, expected, inputs)
    return scan


@pytest.mark.parametrize(("groups", "calls"), [(GROUPS, 2), (MANY_TAILS, 2), (UNSHARED, 1)])
def test_two_calls_equal_each_sequence(groups, calls):
    assert len(compare(groups).bounds) == calls


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(groups_strategy)
def test_any_row(groups):
    compare(groups)


def test_the_order_of_the_calls():
    scan = compare(((2, (0, 3, 1)), (1, (0,)), (4, (5,))))
    assert [bounds.tolist() for bounds in scan.bounds] == [[0, 2, 3, 7], [0, 3, 4, 9]]


def test_it_equals_the_scan_part_by_part():
    inputs, parts = delta_inputs(num_tokens(GROUPS)), RowParts.of(GROUPS)
    by_part = shared_scan(delta_rule, inputs, parts)
    assert_alike(shared_varlen_scan(Varlen(), inputs, parts), by_part, inputs)


def test_layers_share_the_bounds():
    """Kernels keep by the tensor's identity what they compute from it, and for a backward."""
    groups = ((3, (2, 4)), (5, (1, 1)))
    first = Varlen()
    with torch.inference_mode():
        shared_varlen_scan(first, delta_inputs(num_tokens(groups)), RowParts.of(groups))
    assert not any(bounds.is_inference() for bounds in first.bounds)
    second = compare(groups)
    assert all(one is other for one, other in zip(first.bounds, second.bounds, strict=True))


@pytest.mark.parametrize(("count", "words"), [(None, "0"), (1, "1"), (9, "9")])
def test_other_numbers_of_states_are_refused(count, words):
    def scan(inputs, *_):
        return inputs[2], None if count is None else torch.zeros(count, 2, 4, 3)

    match = f"gave {words} final states for 6 shared prefixes"
    with pytest.raises(ValueError, match=match):
        shared_varlen_scan(scan, delta_inputs(num_tokens(GROUPS)), RowParts.of(GROUPS))
