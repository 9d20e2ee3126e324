"""Our attention inside transformers: registered by name, and plugged in for packed rows alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from dpofast_kernels.attention import AttentionOptions, SharedLayout, shared_attention

# transformers gives names with flash, sdpa, flex_attention, "paged|" or "/" a meaning of their own,
# and builds no mask at all for a name that no mask function is registered under.
NAME = "dpofast_shared"


class AttentionCalls:
    """Counts calls of our attention, to see that every layer of a model makes one."""

    count = 0


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
    if shared_layout is None:
        raise RuntimeError(f"{type(module).__name__} doesn't hand the packed layout on.")
    if attention_mask is not None or dropout:
        raise RuntimeError(f"{type(module).__name__} gives packed rows a mask, or dropout.")
    AttentionCalls.count += 1
    options = AttentionOptions(scale=scaling, window=sliding_window, softcap=softcap, sinks=s_aux)
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return shared_attention(query, key, value, shared_layout, options)[None], None


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
    text_config = config.get_text_config()
    configs = {id(each): each for each in (config, text_config)}.values()
    kept = [(each, each._attn_implementation) for each in configs]
    for each in configs:
        each._attn_implementation = NAME
    try:
        yield
    finally:
        for each, name in kept:
            each._attn_implementation = name
