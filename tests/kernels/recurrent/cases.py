"""Layers of one sequence, written token by token, and rows to run them on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dpofast_kernels.recurrent import Groups

# Pairs, one tail, five tails, empty tails in any place, prefixes of one token, and prefixes that
# are shorter than the convolution is wide.
GROUPS: Groups = ((7, (5, 3)), (1, (1, 1)), (4, (9,)), (3, (0, 6)), (6, (2, 0)), (1, (0, 0)))
MANY_TAILS: Groups = ((5, (3, 0, 7, 1, 2)), (1, (4,)), (9, (0,)), (2, (0, 1, 0, 4)))
UNSHARED: Groups = ((12, (0,)), (10, (0,)), (1, (0,)))
WIDTHS = (1, 2, 4, 7)


def num_tokens(groups: Groups) -> int:
    return sum(prefix + sum(tails) for prefix, tails in groups)


def convolve(
    inputs: Tensor,  # [1, C, L]
    weight: Tensor,  # [C, K]
    bias: Tensor,  # [C]
) -> Tensor:
    """[1, C, L], with zeros before the first input, and an activation that isn't 0 at 0."""
    padded = F.pad(inputs, (weight.shape[1] - 1, 0))
    return F.conv1d(padded, weight[:, None], bias, groups=len(weight)).sigmoid()


def delta_rule(
    inputs: Sequence[Tensor],
    initial_state: Tensor | None = None,  # [1, H, D, Dv]
    keeps_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule, token by token.

    S_t = e^{g_t} S_{t-1} + beta_t k_t (v_t - k_t^T e^{g_t} S_{t-1}), o_t = q_t^T S_t.

    Source: arXiv:2412.06464, equation 10.
    """
    query, key, value, decay, beta = inputs
    state = initial_state
    if state is None:
        state = key.new_zeros(*key.shape[0::2], key.shape[-1], value.shape[-1])
    outputs = []
    for token in range(query.shape[1]):
        state = state * decay[:, token, :, None, None].exp()
        known = torch.einsum("bhk,bhkv->bhv", key[:, token], state)
        new = (value[:, token] - known) * beta[:, token, :, None]
        state = state + key[:, token, :, :, None] * new[:, :, None]
        outputs.append(torch.einsum("bhk,bhkv->bhv", query[:, token], state))
    return torch.stack(outputs, 1), state if keeps_state else None


def delta_inputs(length: int) -> list[Tensor]:
    """q, k, v, g and beta of a row, in float64."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, length, *shape, generator=generator, dtype=torch.float64)

    query, key, value = normal(2, 4), F.normalize(normal(2, 4), dim=-1), normal(2, 3)
    decay, beta = -normal(2).abs() * 0.3, normal(2).sigmoid()
    return [each.requires_grad_() for each in (query, key, value, decay, beta)]
