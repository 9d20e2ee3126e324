"""The back ends for a CPU, compared with the naive one and with one sequence at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dpofast_kernels.attention import AttentionOptions, build_layout, shared_attention
from tests.kernels.attention.cases import (
    GROUPS,
    HEADS,
    MANY_TAILS,
    WINDOWS,
    Groups,
    assert_close,
    make_inputs,
    real_groups,
    relative_errors,
    run,
    run_alone,
)

ROWS = {"pairs": GROUPS, "many tails": MANY_TAILS}


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("groups", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("backend", ["sdpa", "plain", "naive"])
def test_equals_each_sequence_alone(backend: str, groups: Groups, heads: str, window: int | None):
    inputs = make_inputs(groups, HEADS[heads])
    got = run(inputs, AttentionOptions(window=window, backend=backend))
    assert_close(got, run_alone(inputs, groups, window))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind", ["softcap", "sinks", "both"])
def test_plain_equals_naive(kind: str, heads: str, window: int | None):
    inputs = make_inputs(GROUPS, HEADS[heads])
    softcap = None if kind == "sinks" else 0.8
    results = [
        run(
            inputs,
            AttentionOptions(scale=0.7, window=window, softcap=softcap, backend=backend),
            with_sinks=kind != "softcap",
        )
        for backend in ("plain", "naive")
    ]
    assert_close(*results)
    without = run(inputs, AttentionOptions(scale=0.7, window=window))
    # With one key, its share is 1 whatever its score, so a softcap changes nothing. A sink does.
    if window != 1 or kind != "softcap":
        assert (without["output"] - results[0]["output"]).abs().max() > 0.1


def test_sinks_are_an_extra_key_without_value():
    """The definition written out: a key that every query looks at and whose value is zero."""
    inputs = make_inputs([(5, (0,))], HEADS["mha"])
    got = run(inputs, AttentionOptions(), with_sinks=True)["output"]
    scores = torch.einsum("qhd,khd->hqk", inputs.query, inputs.key) * 8**-0.5
    weights = scores.exp().tril()
    total = weights.sum(-1) + inputs.sinks.exp()[:, None]
    expected = torch.einsum("hqk,khd->qhd", weights / total[..., None], inputs.value)
    assert (got - expected).abs().max().item() < 1e-12


@pytest.mark.parametrize("backend", ["sdpa", "plain"])
def test_real_lengths(backend: str):
    groups = real_groups(2)
    inputs = make_inputs(groups, HEADS["gqa"])
    got = run(inputs, AttentionOptions(window=300, backend=backend))
    assert_close(got, run_alone(inputs, groups, 300))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["sdpa", "plain"])
def test_lower_precision(backend: str, dtype: torch.dtype):
    inputs = make_inputs(GROUPS, HEADS["gqa"], dtype)
    got = run(inputs, AttentionOptions(backend=backend))
    assert all(tensor.dtype == dtype for tensor in got.values())
    expected = run(inputs.to("cpu", torch.float64), AttentionOptions(backend="naive"))
    errors = relative_errors(got, expected)
    allowed = 8 * torch.finfo(dtype).eps
    assert max(errors.values()) < allowed, errors


@pytest.mark.parametrize("backend", ["sdpa", "plain", "naive"])
def test_autocast_casts_all_three(backend: str):
    inputs = make_inputs(GROUPS, HEADS["gqa"], torch.float32)
    inputs.value = inputs.value.bfloat16()  # only queries and keys pass rotary embeddings

    def under_autocast(*args: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return shared_attention(*args)

    got = run(inputs, AttentionOptions(backend=backend), under_autocast)
    expected = run(inputs.to("cpu", torch.bfloat16), AttentionOptions(backend=backend))
    assert got["query"].dtype == torch.float32
    assert got["output"].dtype == torch.bfloat16
    for name, truth in expected.items():
        assert torch.equal(got[name].bfloat16(), truth), name


def test_float64_is_left_alone_by_autocast():
    inputs = make_inputs(GROUPS, HEADS["mha"])
    with torch.autocast("cpu", torch.bfloat16):
        got = run(inputs, AttentionOptions())
    assert_close(got, run_alone(inputs, GROUPS, None))


def test_views_of_transformers_tensors():
    """In some models the heads come first in memory."""
    inputs = make_inputs(GROUPS, HEADS["gqa"])
    expected = run(inputs, AttentionOptions())
    for name in ("query", "key", "value"):
        states = getattr(inputs, name)
        setattr(inputs, name, states.transpose(0, 1).contiguous().transpose(0, 1))
    assert_close(run(inputs, AttentionOptions()), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(4, 2, 8)}, r"query is \[4, 2, 8\], expected \[5, heads"),
        ({"key": torch.zeros(5, 16)}, r"key is \[5, 16\]"),
        ({"key": torch.zeros(5, 2, 8).double()}, "key is torch.float64 and query torch.float32"),
        ({"key": torch.zeros(5, 2, 4)}, "keys are of size 4, expected 8"),
        ({"value": torch.zeros(5, 1, 8)}, "2 of keys and 1 of values"),
        ({"query": torch.zeros(5, 3, 8)}, "3 query heads, 2 of keys"),
        ({"value": torch.zeros(5, 2, 8, device="meta")}, "value is on meta and the layout on cpu"),
        ({"options": AttentionOptions(sinks=torch.zeros(2))}, r"sinks is \[2\].*of 4 heads"),
    ],
)
def test_refuses_what_does_not_fit(change: dict, message: str):
    arguments = {
        "query": torch.zeros(5, 4, 8),
        "key": torch.zeros(5, 2, 8),
        "value": torch.zeros(5, 2, 8),
        "layout": build_layout([(2, (1, 2))]),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        shared_attention(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, "scale is 0.0"),
        ({"softcap": float("inf")}, "softcap is inf"),
        ({"window": 0}, "window is 0, expected at least 1"),
        ({"chunk": 0}, "chunk is 0, expected at least 1"),
        ({"backend": "triton"}, "Unknown backend 'triton'"),
    ],
)
def test_refuses_options_out_of_range(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        AttentionOptions(**options)
