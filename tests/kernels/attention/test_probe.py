"""The probe accepts right back ends and refuses wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dpofast_kernels.attention import AttentionOptions, build_layout, dispatch, probe
from dpofast_kernels.attention.call import AttentionCall
from dpofast_kernels.attention.segments import sdpa_attention


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 1, 7, 4096])
@pytest.mark.parametrize("kind", ["sdpa", "plain"])
def test_passes(kind: str, window: int | None, dtype: torch.dtype):
    options = AttentionOptions(window=window, backend=kind)
    if kind == "plain":
        options = replace(options, softcap=4.0, sinks=torch.zeros(4))
    probe("cpu", dtype, 4, 2, 24, 16, options)


def transposed(call: AttentionCall) -> Tensor:
    return sdpa_attention(replace(call, value=call.value.flip(1)))


def unscaled(call: AttentionCall) -> Tensor:
    return sdpa_attention(replace(call, options=replace(call.options, scale=1.0)))


def windowless(call: AttentionCall) -> Tensor:
    return sdpa_attention(replace(call, options=replace(call.options, window=None)))


def one_more(call: AttentionCall) -> Tensor:
    wider = replace(call.options, window=call.options.window + 1)
    return sdpa_attention(replace(call, options=wider))


def mixed(call: AttentionCall) -> Tensor:
    """Every token looks at all tokens before it, those of other groups included."""
    return sdpa_attention(replace(call, layout=build_layout([(call.layout.num_tokens, (0,))])))


def no_key_gradient(call: AttentionCall) -> Tensor:
    return sdpa_attention(replace(call, key=call.key.detach() + 0 * call.key))


def nan(call: AttentionCall) -> Tensor:
    return sdpa_attention(call) * float("nan")


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (transposed, "output"),
        (unscaled, "output"),
        (windowless, "output"),
        (one_more, "output"),
        (mixed, "output"),
        (no_key_gradient, "gradient of key"),
        (nan, "output"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_refuses(
    monkeypatch: pytest.MonkeyPatch,
    wrong: Callable[[AttentionCall], Tensor],
    what: str,
    dtype: torch.dtype,
):
    monkeypatch.setitem(dispatch.ATTENTIONS, "sdpa", wrong)
    with pytest.raises(RuntimeError, match=f"'sdpa' is wrong on cpu: its {what} in {dtype}"):
        probe("cpu", dtype, 4, 2, 16, 16, AttentionOptions(window=4096))


def test_leaves_the_random_numbers_alone():
    before = torch.get_rng_state()
    probe("cpu", torch.float32, 2, 1, 8, 8)
    assert torch.equal(torch.get_rng_state(), before)
