"""Our attention inside transformers: registered by name, and plugged in for packed rows alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from dpofast.errors import ModelError
from dpofast_kernels.attention import AttentionOptions, SharedLayout, shared_attention

# transformers gives names with flash, sdpa, flex_attention, "paged|" or "/" a meaning of their own,
# and builds no mask at all for a name that no mask function is registered under.
NAME = "dpofast_shared"


@dataclass(frozen=True)
class AttentionCall:
    """What a layer asked of our attention, sizes and numbers alone.

    Attributes:
        dtype: of the query.
        num_heads, num_kv_heads: of queries, and of keys and values.
        head_dim, value_dim: sizes of their heads.
        scale, window, softcap: those of AttentionOptions.
        has_sinks: the layer has a sink per head.
    """

    dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    scale: float | None
    window: int | None
    softcap: float | None
    has_sinks: bool


class CallCounter:
    """Counts the calls of our attention, and records them when asked to.

    The count shows whether a packed row reached our attention in every layer: any other attention
    would mix the sequences of the row.

    Attributes:
        count: calls so far in this process.
        recorded: the calls since recording began; None while nothing is recorded.
    """

    def __init__(self) -> None:
        self.count = 0
        self.recorded: list[AttentionCall] | None = None


attention_calls = CallCounter()


@contextlib.contextmanager
def recorded_calls() -> Iterator[list[AttentionCall]]:
    """Inside, every call of our attention is recorded, and runs the plain way on any device."""
    calls: list[AttentionCall] = []
    attention_calls.recorded = calls
    try:
        yield calls
    finally:
        attention_calls.recorded = None


def _attention(
    module: nn.Module,
    query: Tensor,  # [1, Hq, T, D]
    key: Tensor,  # [1, Hkv, T, D]
    value: Tensor,  # [1, Hkv, T, Dv]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    shared_layout: SharedLayout | None = None,
    **_others: Any,
) -> tuple[Tensor, None]:
    """[1, T, Hq, Dv]; what transformers calls in every layer."""
    layer = type(module).__name__
    if shared_layout is None:
        raise ModelError(f"{layer} doesn't hand the packed layout on; set layout: padded.")
    if attention_mask is not None or dropout:
        raise ModelError(f"{layer} gives packed rows a mask, or dropout; set layout: padded.")
    attention_calls.count += 1
    options = AttentionOptions(scale=scaling, window=sliding_window, softcap=softcap, sinks=s_aux)
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if attention_calls.recorded is not None:
        attention_calls.recorded.append(_call(query, key, value, options))
        options = replace(options, backend="plain")
    return shared_attention(query, key, value, shared_layout, options)[None], None


def _call(query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> AttentionCall:
    return AttentionCall(
        dtype=query.dtype,
        num_heads=query.shape[1],
        num_kv_heads=key.shape[1],
        head_dim=query.shape[2],
        value_dim=value.shape[2],
        scale=options.scale,
        window=options.window,
        softcap=options.softcap,
        has_sinks=options.sinks is not None,
    )


AttentionInterface.register(NAME, _attention)


@contextlib.contextmanager
def packed_attention(config: Any, layout: SharedLayout | None) -> Iterator[None]:
    """Inside, a model of this config attends as a packed row's layout says.

    The backward belongs inside, too: gradient checkpointing runs the layers again there. Without a
    layout nothing changes.
    """
    if layout is None:
        yield
        return
    with _implementation(config, NAME):
        yield


@contextlib.contextmanager
def any_dtype_attention(config: Any) -> Iterator[None]:
    """Inside, a model of this config attends in any dtype and on any device.

    FlashAttention's kernels, where a model has them, take half precision on GPUs alone; checks run
    in the weights' own dtype, where these lie.
    """
    if "flash" not in str(config.get_text_config()._attn_implementation):
        yield
        return
    with _implementation(config, "eager"):
        yield


@contextlib.contextmanager
def _implementation(config: Any, name: str) -> Iterator[None]:
    text_config = config.get_text_config()
    configs = {id(each): each for each in (config, text_config)}.values()
    kept = [(each, each._attn_implementation) for each in configs]
    for each in configs:
        each._attn_implementation = name
    try:
        yield
    finally:
        for each, before in kept:
            each._attn_implementation = before
