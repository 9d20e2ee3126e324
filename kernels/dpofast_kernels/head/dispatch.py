"""The public ops: inputs are checked here, and a backend is chosen."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dpofast_kernels.head.checks import check_head_inputs, check_pairs, compute_dtype
from dpofast_kernels.head.naive import naive_linear_logps, naive_pair_loss
from dpofast_kernels.head.options import HeadOptions, PairLossOutput
from dpofast_kernels.preference import PairLoss

DEFAULT_OPTIONS = HeadOptions()


def backend_for(tensor: Tensor, options: HeadOptions = DEFAULT_OPTIONS) -> str:
    """Which backend will run on this tensor's device."""
    return "naive"


def linear_logps(
    hidden_states: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [N]
    options: HeadOptions = DEFAULT_OPTIONS,
) -> Tensor:
    """Per-token log-probs of `labels`: [N] fp32 (fp64 for fp64 inputs), in nats."""
    check_head_inputs(hidden_states, weight, labels, options)
    dtype = compute_dtype(hidden_states, weight)
    with torch.autocast(hidden_states.device.type, enabled=False):
        bias = None if options.bias is None else options.bias.to(dtype)
        cast = replace(options, bias=bias)
        return naive_linear_logps(hidden_states.to(dtype), weight.to(dtype), labels, cast)


def linear_pair_loss(
    hidden_states: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [N]
    bounds: Tensor,  # [2P+1]
    ref_logps: Tensor,  # [2P]
    loss: PairLoss,
    options: HeadOptions = DEFAULT_OPTIONS,
) -> PairLossOutput:
    """The sum over pairs of the loss, and the summed log-probs."""
    check_pairs(bounds, ref_logps, len(labels))
    per_token_logps = linear_logps(hidden_states, weight, labels, options)
    return naive_pair_loss(per_token_logps, bounds, ref_logps, loss)
