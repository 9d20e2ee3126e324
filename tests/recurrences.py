"""Recurrences token by token, in products of matrices: what the work of a state is by definition.

Each takes and returns what the function of transformers does whose place it takes, for a sequence
from its beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def delta_rule(
    query: Tensor,  # [1, L, Hk, D]
    key: Tensor,  # [1, L, Hk, D]
    value: Tensor,  # [1, L, H, Dv]
    *,
    g: Tensor,  # [1, L, H], or [1, L, H, D] if each channel of the keys decays in its own way
    beta: Tensor,  # [1, L, H]
    **_: Any,
) -> tuple[Tensor, None]:
    """The gated delta rule: S = decay S, then S += key (beta (value - key S)), and query S."""
    heads = value.shape[2]
    query, key = (
        (each * (each.square().sum(-1, keepdim=True) + 1e-6).rsqrt()).repeat_interleave(
            heads // each.shape[2], 2
        )
        for each in (query, key)
    )
    decay = (g if g.dim() == 4 else g[..., None]).exp()
    state = value.new_zeros(heads, key.shape[-1], value.shape[-1])
    outputs = []
    for t in range(value.shape[1]):
        state = state * decay[0, t, :, :, None]
        row = key[0, t, :, None]  # [H, 1, D]
        change = beta[0, t, :, None, None] * (value[0, t, :, None] - row @ state)
        state = state + row.mT @ change
        outputs.append(query[0, t, :, None] @ state)
    return torch.stack(outputs)[None, :, :, 0] * query.shape[-1] ** -0.5, None


def state_space(
    inputs: Tensor,  # [1, L, H, P]
    dt: Tensor,  # [1, L, H]
    decay: Tensor,  # [H]
    to_state: Tensor,  # [1, L, G, N]
    from_state: Tensor,  # [1, L, G, N]
    *,
    D: Tensor,  # noqa: N803 - the name in transformers
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **_: Any,
) -> Tensor:
    """Mamba-2: S = decay^dt S + to_state (dt input), and from_state S."""
    heads = inputs.shape[2]
    dt = dt if dt_bias is None else dt + dt_bias
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    to_state, from_state = (
        each.repeat_interleave(heads // each.shape[2], 2) for each in (to_state, from_state)
    )
    state = inputs.new_zeros(heads, to_state.shape[-1], inputs.shape[-1])
    outputs = []
    for t in range(inputs.shape[1]):
        state = state * (decay * dt[0, t]).exp()[:, None, None]
        given = dt[0, t, :, None, None] * inputs[0, t, :, None]  # [H, 1, P]
        state = state + to_state[0, t, :, :, None] @ given
        outputs.append(from_state[0, t, :, None] @ state)
    return torch.stack(outputs)[None, :, :, 0] + D[:, None] * inputs


# By the names of transformers' functions.
RECURRENCES: Mapping[str, Callable[..., Any]] = {
    "chunk_kimi_delta_attention": delta_rule,
    "mamba2_chunk_scan": state_space,
    "torch_chunk_gated_delta_rule": delta_rule,
}
