"""Attention merged from two parts, compared with one call under a mask."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from dpofast_kernels.attention import AttentionOptions, segments
from dpofast_kernels.attention.call import AttentionCall
from dpofast_kernels.attention.merged import can_merge
from tests.kernels.attention.cases import (
    GROUPS,
    HEADS,
    MANY_TAILS,
    Groups,
    assert_close,
    make_inputs,
    real_groups,
    relative_errors,
    run,
)

ROWS = {"pairs": GROUPS, "many tails": MANY_TAILS}
SDPA = AttentionOptions(backend="sdpa")


@pytest.fixture
def masked(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Merge no call until this is undone."""
    with monkeypatch.context() as context:
        context.setattr(segments, "can_merge", lambda *_: False)
        yield context


@pytest.mark.parametrize("heads", ["mha", "gqa", "mqa"])
@pytest.mark.parametrize("groups", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("scale", [None, 0.7, 30.0])
def test_equals_one_call_under_a_mask(masked, groups: Groups, heads: str, scale: float | None):
    """With a scale of 30 scores differ by hundreds, so one part has nearly all of the softmax."""
    inputs = make_inputs(groups, HEADS[heads])
    options = AttentionOptions(scale=scale, backend="sdpa")
    expected = run(inputs, options)
    masked.undo()
    assert_close(run(inputs, options), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loses_no_more_in_low_precision(masked, dtype: torch.dtype):
    groups = real_groups(4)
    inputs = make_inputs(groups, HEADS["gqa"], dtype)
    truth = run(inputs.to("cpu", torch.float64), AttentionOptions(backend="sdpa"))
    under_a_mask = relative_errors(run(inputs, SDPA), truth)
    masked.undo()
    for name, error in relative_errors(run(inputs, SDPA), truth).items():
        assert error <= 1.2 * under_a_mask[name], (name, error, under_a_mask[name])


def test_repeats_itself_on_real_lengths_with_two_threads(masked, one_thread):
    inputs = make_inputs(real_groups(8), HEADS["gqa"])
    expected = run(inputs, SDPA)
    masked.undo()
    torch.set_num_threads(2)
    first, again = run(inputs, SDPA), run(inputs, SDPA)
    torch.set_num_threads(1)
    assert_close(first, expected)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_copies_no_keys(monkeypatch):
    monkeypatch.delattr(segments, "gather_keys")
    run(make_inputs(GROUPS, HEADS["gqa"]), SDPA)


def test_where_it_runs():
    inputs = make_inputs(GROUPS, HEADS["gqa"])
    states = (inputs.query, inputs.key, inputs.value)
    call = AttentionCall(*states, inputs.layout, AttentionOptions())
    assert can_merge(call)
    assert not can_merge(replace(call, options=AttentionOptions(window=3)))
    assert not can_merge(replace(call, value=inputs.value[..., 1:]))
    assert not can_merge(replace(call, query=inputs.query.to("meta")))
