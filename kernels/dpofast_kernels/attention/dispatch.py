"""The public op: it checks its inputs and chooses a back end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dpofast_kernels.attention.backends import choose_backend, machine_of
from dpofast_kernels.attention.call import AttentionCall
from dpofast_kernels.attention.chunks import attention_in_chunks
from dpofast_kernels.attention.flash import (
    flash3_attention,
    flash_attn_attention,
    padded_head_dim,
    varlen_attention,
)
from dpofast_kernels.attention.flex import flex_attention_on_row
from dpofast_kernels.attention.layout import SharedLayout
from dpofast_kernels.attention.naive import naive_attention
from dpofast_kernels.attention.options import AttentionOptions
from dpofast_kernels.attention.segments import plain_attention, sdpa_attention

DEFAULT_OPTIONS = AttentionOptions()
# The back ends by name. Each returns [T, Hq, Dv] and is differentiable by autograd.
ATTENTIONS: dict[str, Callable[[AttentionCall], Tensor]] = {
    "sdpa": sdpa_attention,
    "plain": plain_attention,
    "varlen": varlen_attention,
    "flash3": flash3_attention,
    "flash_attn": flash_attn_attention,
    "flex": flex_attention_on_row,
    "naive": naive_attention,
}


def backend_for(query: Tensor, value: Tensor, options: AttentionOptions = DEFAULT_OPTIONS) -> str:
    """The name of the back end that runs for tensors like these; never "auto".

    Args:
        query: [T, Hq, D].
        value: [T, Hkv, Dv].
        options: options of the op.

    Raises:
        ValueError: the back end asked for can't run, with the reason.
    """
    head_dim = padded_head_dim(query.shape[-1], value.shape[-1])
    return choose_backend(machine_of(query.device), _compute_dtype(query), head_dim, options)


def shared_attention(
    query: Tensor,  # [T, Hq, D]
    key: Tensor,  # [T, Hkv, D]
    value: Tensor,  # [T, Hkv, Dv]
    layout: SharedLayout,
    options: AttentionOptions = DEFAULT_OPTIONS,
) -> Tensor:
    """Causal attention in a packed row: each sequence gets the result that it would have by itself.

    Args:
        query: [T, Hq, D] fp64, fp32, bf16 or fp16.
        key: [T, Hkv, D], same dtype. Under torch.autocast the dtypes may differ, and all three
            tensors are cast to the autocast dtype.
        value: [T, Hkv, Dv], like `key`.
        layout: layout of the row, on the same device.
        options: scale, window, cap and sinks of the scores, and the back end.

    Returns:
        [T, Hq, Dv] in the inputs' dtype, or the autocast dtype; differentiable once.

    Raises:
        ValueError: shapes, dtypes or devices don't match, or the back end asked for can't run.

    Numerics: the softmax is computed in fp32 at least. Back ends that work on segments add up the
    gradients of a prefix's keys and values over its segments, in the tensors' dtype and in a fixed
    order.

    Example:
        >>> import torch
        >>> from dpofast_kernels.attention import AttentionOptions, build_layout, shared_attention
        >>> layout = build_layout([(4, (3, 2)), (2, (5, 1))])  # two pairs, T 17
        >>> query = torch.randn(17, 8, 64)  # 8 query heads of 64
        >>> key, value = torch.randn(2, 17, 2, 64)  # 2 heads of keys and of values
        >>> shared_attention(query, key, value, layout, AttentionOptions(window=4)).shape
        torch.Size([17, 8, 64])
    """
    _check_shapes(query, key, value, layout, options)
    dtype = _compute_dtype(query)
    backend = backend_for(query, value, options)
    if options.window is not None and options.window >= layout.max_key_length:
        # No sequence exceeds the window, so it hides nothing. Kernels are faster without a window.
        options = replace(options, window=None)
    if options.chunk is not None and options.chunk >= layout.max_key_length:
        options = replace(options, chunk=None)  # every sequence is in its first chunk
    with torch.autocast(query.device.type, enabled=False):
        call = AttentionCall(query.to(dtype), key.to(dtype), value.to(dtype), layout, options)
        if options.chunk is not None and backend != "naive":
            return attention_in_chunks(ATTENTIONS[backend], call, options.chunk)
        return ATTENTIONS[backend](call)


def _compute_dtype(query: Tensor) -> torch.dtype:
    """The autocast dtype under autocast, else the query's own. Autocast leaves float64 alone."""
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type) and query.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return query.dtype


def _check_shapes(
    query: Tensor, key: Tensor, value: Tensor, layout: SharedLayout, options: AttentionOptions
) -> None:
    """Check that shapes, dtypes and devices match.

    Raises:
        ValueError: an argument doesn't match; the message names it.
    """
    num_tokens = layout.num_tokens
    for name, states in (("query", query), ("key", key), ("value", value)):
        if states.dim() != 3 or len(states) != num_tokens:
            raise ValueError(
                f"{name} is {list(states.shape)}, expected [{num_tokens}, heads, head size]: the "
                f"layout's row has {num_tokens} tokens."
            )
        if states.device != layout.device:
            raise ValueError(
                f"{name} is on {states.device} and the layout on {layout.device}: move the layout "
                "with its to()."
            )
        if states.dtype != query.dtype and not torch.is_autocast_enabled(states.device.type):
            raise ValueError(
                f"{name} is {states.dtype} and query {query.dtype}: cast one of them, or run the "
                "op under torch.autocast."
            )
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    if value.shape[1] != num_kv_heads or num_heads % num_kv_heads:
        raise ValueError(
            f"There are {num_heads} query heads, {num_kv_heads} of keys and {value.shape[1]} of "
            "values, expected as many keys as values, and a multiple of them of queries."
        )
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"Heads of keys are of size {key.shape[2]}, expected {query.shape[2]} as in the query."
        )
    if options.sinks is not None and options.sinks.shape != (num_heads,):
        raise ValueError(
            f"sinks is {list(options.sinks.shape)}, expected one for each of {num_heads} heads."
        )
