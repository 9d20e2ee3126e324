"""What attention layers do by a token's place in its row, where packed rows need its position.

Llama 4 counts chunks of attention, and the temperature of its layers without RoPE, from the
beginning of a row. A sequence of a packed row begins elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpofast.model.parts import CHUNKED_LAYER
from dpofast_kernels.attention import SharedLayout


def chunk_of(layer: Any) -> int | None:
    """Number of positions in a chunk, outside of which a layer's queries see nothing; or None."""
    config: Any = getattr(layer, "config", None)
    layer_types = getattr(config, "layer_types", None) or ()
    if CHUNKED_LAYER not in layer_types or layer_types[layer.layer_idx] != CHUNKED_LAYER:
        return None
    chunk: int | None = config.attention_chunk_size
    return chunk


def own_temperature(
    layer: Any,
    query: Tensor,  # [T, Hq, D]
    layout: SharedLayout,
) -> Tensor:
    """[T, Hq, D]: a packed row's queries with the temperatures of their own positions.

    Args:
        layer: attention layer; it has multiplied the queries by the temperatures of their places in
            the row, if it has any.
        query: the layer's queries.
        layout: layout of the row.
    """
    if not getattr(layer, "attn_temperature_tuning", False) or layer.use_rope:
        return query
    if layout.num_tokens < layer.floor_scale:  # up to there, all temperatures are 1
        return query
    places = torch.arange(layout.num_tokens, device=query.device)
    ratios = _temperatures(layer, layout.position_ids) / _temperatures(layer, places)
    return (query * ratios[:, None, None]).to(query.dtype)


def _temperatures(layer: Any, positions: Tensor) -> Tensor:
    """[T] fp32: what Llama 4 multiplies queries by, see arXiv:2501.19399."""
    steps = torch.floor((positions.float() + 1.0) / layer.floor_scale)
    return torch.log1p(steps) * layer.attn_scale + 1.0
