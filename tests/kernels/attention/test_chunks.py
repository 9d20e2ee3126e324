"""Attention in chunks, compared with the naive mask and with one sequence at a time."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from dpofast_kernels.attention import AttentionOptions, build_layout, probe
from dpofast_kernels.attention.chunks import chunked_row
from tests.kernels.attention.cases import (
    GROUPS,
    HEADS,
    MANY_TAILS,
    Groups,
    assert_close,
    make_inputs,
    run,
    run_alone,
)

CHUNKS = (1, 2, 3, 5, 7, 11, 1000)  # the longest sequence has 12 tokens
ROWS = {"pairs": GROUPS, "many tails": MANY_TAILS}


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("groups", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("backend", ["sdpa", "plain", "naive"])
def test_equals_each_sequence_alone(backend: str, groups: Groups, chunk: int):
    inputs = make_inputs(groups, HEADS["gqa"])
    got = run(inputs, AttentionOptions(chunk=chunk, backend=backend))
    assert_close(got, run_alone(inputs, groups, None, chunk))


@pytest.mark.parametrize("chunk", [2, 5])
def test_chunks_and_a_window_hide_what_each_hides(chunk: int):
    inputs = make_inputs(MANY_TAILS, HEADS["mha"])
    for backend in ("sdpa", "plain", "naive"):
        got = run(inputs, AttentionOptions(window=3, chunk=chunk, backend=backend))
        assert_close(got, run_alone(inputs, MANY_TAILS, 3, chunk))


def test_caps_and_sinks_hold_in_chunks():
    inputs = make_inputs(GROUPS, HEADS["gqa"])
    options = partial(AttentionOptions, scale=0.7, chunk=3, softcap=0.8)
    results = [run(inputs, options(backend=each), with_sinks=True) for each in ("plain", "naive")]
    assert_close(*results)


def test_the_example():
    row = chunked_row(build_layout([(3, (2, 1))]), 2)
    assert ["abcdef"[place] for place in row.order] == [*"abcdfe"]
    assert row.order[row.inverse].tolist() == [*range(6)]
    assert row.layout.groups == ((2, (0,)), (1, (1, 1)), (1, (0,)))


def test_the_probe_tries_chunks():
    options = AttentionOptions(chunk=8192)
    assert probe("cpu", torch.float64, 4, 2, 8, 8, options) == "sdpa"
