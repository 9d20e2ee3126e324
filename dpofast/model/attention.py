"""Our attention inside transformers: registered by name, and plugged in for packed rows only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from dpofast.errors import ModelError
from dpofast.model.own_positions import chunk_of, own_temperature
from dpofast_kernels.attention import AttentionOptions, SharedLayout, shared_attention

# transformers treats names with flash, sdpa, flex_attention, "paged|" or "/" in a special way, so
# this name contains none of them. No mask function is registered under it either, so transformers
# builds no mask; the packed layout says what attends to what.
NAME = "dpofast_shared"


@dataclass(frozen=True)
class LayerAttention:
    """One layer's call of our attention, reduced to what decides how it runs.

    Attributes:
        dtype: dtype of the query.
        num_heads: query heads.
        num_kv_heads: key heads, and as many value heads.
        head_dim: size of a query head and of a key head.
        value_dim: size of a value head.
        scale, window, chunk, softcap: the fields of AttentionOptions with these names.
        has_sinks: True if the layer has a sink per head.
    """

    dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    scale: float | None
    window: int | None
    chunk: int | None
    softcap: float | None
    has_sinks: bool


class CallCounter:
    """Counts the calls of our attention, and records them when asked to.

    The count shows whether a packed row reached our attention in every layer. Any other attention
    would mix the row's sequences.

    Attributes:
        count: calls in this process so far.
        recorded: calls since recording began; None while nothing is recorded.
    """

    def __init__(self) -> None:
        self.count = 0
        self.recorded: list[LayerAttention] | None = None


# One per process, as transformers knows our attention by its name only.
attention_calls = CallCounter()


@contextlib.contextmanager
def recorded_calls() -> Iterator[list[LayerAttention]]:
    """Records every call of our attention inside the `with` block, and runs it the plain way.

    The plain backend runs on any device. A kernel that `check_attention` hasn't tested yet can
    therefore not disturb the recording.

    Yields:
        The calls, in the order of the layers.
    """
    calls: list[LayerAttention] = []
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
    """The function that transformers calls in every layer of a packed row.

    Its arguments have transformers' names; `s_aux` are the sinks.

    Returns:
        [1, T, Hq, Dv], and None in place of the attention weights, which are never computed.

    Raises:
        ModelError: the layer didn't pass the layout on, or wants a mask or dropout.
    """
    layer = type(module).__name__
    if shared_layout is None:
        raise ModelError(f"{layer} doesn't hand the packed layout on; set layout: padded.")
    if attention_mask is not None or dropout:
        raise ModelError(f"{layer} gives packed rows a mask, or dropout; set layout: padded.")
    attention_calls.count += 1
    options = AttentionOptions(
        scale=scaling, window=sliding_window, chunk=chunk_of(module), softcap=softcap, sinks=s_aux
    )
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    query = own_temperature(module, query, shared_layout)
    if attention_calls.recorded is not None:
        attention_calls.recorded.append(_call(query, key, value, options))
        options = replace(options, backend="plain")
    return shared_attention(query, key, value, shared_layout, options)[None], None


def _call(query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> LayerAttention:
    return LayerAttention(
        dtype=query.dtype,
        num_heads=query.shape[1],
        num_kv_heads=key.shape[1],
        head_dim=query.shape[2],
        value_dim=value.shape[2],
        scale=options.scale,
        window=options.window,
        chunk=options.chunk,
        softcap=options.softcap,
        has_sinks=options.sinks is not None,
    )


AttentionInterface.register(NAME, _attention)


@contextlib.contextmanager
def packed_attention(config: Any, layout: SharedLayout | None) -> Iterator[None]:
    """Inside the `with` block, a model attends as a packed row's layout says.

    `micro_batch` enters this for training and scoring. The backward belongs inside the block, too,
    because gradient checkpointing runs the layers again during the backward.

    Args:
        config: the model's config.
        layout: layout of the packed row; None for padded rows, which keep the model's attention.
    """
    if layout is None:
        yield
        return
    with _implementation(config, NAME):
        yield


@contextlib.contextmanager
def any_dtype_attention(config: Any) -> Iterator[None]:
    """Inside the `with` block, a model can attend in any dtype and on any device.

    FlashAttention's kernels need a GPU and half precision. The checks run a model on the device and
    in the dtype that its weights have at that time, so they use eager attention instead.
    """
    if "flash" not in str(config.get_text_config()._attn_implementation):
        yield
        return
    with _implementation(config, "eager"):
        yield


@contextlib.contextmanager
def _implementation(config: Any, name: str) -> Iterator[None]:
    """Sets the attention's name inside the block; layers look it up in every call."""
    text_config = config.get_text_config()
    # Often these are one object, and a multimodal config has a text config of its own.
    configs = {id(part): part for part in (config, text_config)}.values()
    kept = [(part, part._attn_implementation) for part in configs]
    for part in configs:
        part._attn_implementation = name
    try:
        yield
    finally:
        for part, before in kept:
            part._attn_implementation = before
