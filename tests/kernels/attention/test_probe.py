"""The probe lets right backends pass, and none that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dpofast_kernels.attention import AttentionOptions, SharedLayout, build_layout, dispatch, probe
from dpofast_kernels.attention.segments import sdpa_attention

Change = Callable[[Tensor, Tensor, Tensor, SharedLayout, AttentionOptions], Tensor]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 1, 7, 4096])
@pytest.mark.parametrize("kind", ["sdpa", "plain"])
def test_passes(kind: str, window: int | None, dtype: torch.dtype):
    options = AttentionOptions(window=window, backend=kind)
    if kind == "plain":
        options = replace(options, softcap=4.0, sinks=torch.zeros(4))
    probe("cpu", dtype, 4, 2, 24, 16, options)


def _transposed(query, key, value, layout, options):
    return sdpa_attention(query, key, value.flip(1), layout, options)


def _unscaled(query, key, value, layout, options):
    return sdpa_attention(query, key, value, layout, replace(options, scale=1.0))


def _windowless(query, key, value, layout, options):
    return sdpa_attention(query, key, value, layout, replace(options, window=None))


def _one_more(query, key, value, layout, options):
    wider = replace(options, window=options.window + 1)
    return sdpa_attention(query, key, value, layout, wider)


def _mixed(query, key, value, layout, options):
    row = build_layout([(layout.num_tokens, (0,))])
    return sdpa_attention(query, key, value, row, options)


def _no_key_gradient(query, key, value, layout, options):
    return sdpa_attention(query, key.detach() + 0 * key, value, layout, options)


def _nan(query, key, value, layout, options):
    return sdpa_attention(query, key, value, layout, options) * float("nan")


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (_transposed, "output"),
        (_unscaled, "output"),
        (_windowless, "output"),
        (_one_more, "output"),
        (_mixed, "output"),
        (_no_key_gradient, "gradient of key"),
        (_nan, "output"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_refuses(monkeypatch: pytest.MonkeyPatch, wrong: Change, what: str, dtype: torch.dtype):
    monkeypatch.setitem(dispatch._ATTENTION, "sdpa", wrong)
    with pytest.raises(RuntimeError, match=f"'sdpa' is wrong on cpu: its {what} in {dtype}"):
        probe("cpu", dtype, 4, 2, 16, 16, AttentionOptions(window=4096))


def test_leaves_the_random_numbers_alone():
    before = torch.get_rng_state()
    probe("cpu", torch.float32, 2, 1, 8, 8)
    assert torch.equal(torch.get_rng_state(), before)
