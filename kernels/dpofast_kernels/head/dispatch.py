"""The public ops: inputs are checked here, and a backend is chosen."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dpofast_kernels.head.autograd import (
    HeadCall,
    apply_linear_logps,
    apply_linear_pair_loss,
    forward_only,
)
from dpofast_kernels.head.checks import (
    IGNORED_LABEL,
    check_head_inputs,
    check_padded_inputs,
    check_pairs,
    compute_dtype,
)
from dpofast_kernels.head.naive import (
    naive_linear_logps,
    naive_linear_scores,
    naive_pair_loss,
)
from dpofast_kernels.head.one_pass import Pairs
from dpofast_kernels.head.options import HeadOptions, PairLossOutput
from dpofast_kernels.preference import PairLoss

DEFAULT_OPTIONS = HeadOptions()
TRITON_BACKENDS = ("triton", "triton_fused")


def backend_for(tensor: Tensor, options: HeadOptions = DEFAULT_OPTIONS) -> str:
    """The backend that runs for tensors on this one's device, by its name; never "auto".

    Raises:
        ValueError: the backend asked for can't take an option, or no such device.
        RuntimeError: Triton was asked for and isn't installed.
    """
    if options.backend == "naive" and options.weight_grad is not None:
        raise ValueError(
            "backend 'naive' can't add to weight_grad: leave it None, or choose another backend."
        )
    if options.backend == "auto":
        # ROCm's devices are called cuda, too
        return "triton" if tensor.is_cuda and _has_triton() else "torch"
    if options.backend in TRITON_BACKENDS:
        if not _has_triton():
            raise RuntimeError(
                f"backend {options.backend!r} was asked for, but Triton isn't installed: install "
                "it (Linux only), or choose backend 'torch'."
            )
        if not tensor.is_cuda and not _is_interpreted():
            raise ValueError(
                f"backend {options.backend!r} was asked for, but the tensors are on "
                f"{tensor.device}: move them to a CUDA or ROCm device, set TRITON_INTERPRET=1 "
                "before Triton is imported (for tests), or choose backend 'torch'."
            )
    return options.backend


def linear_logps(
    hidden_states: Tensor,  # [N, H] or [B, T, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [N] or [B, T]
    options: HeadOptions = DEFAULT_OPTIONS,
) -> Tensor:
    """Per-token log-probs of `labels`, without materialising the logits.

    Args:
        hidden_states: [N, H] fp64, fp32, bf16 or fp16; or [B, T, H], of which only the positions
            that have a label are worked on (finding them waits for a device).
        weight: [V, H], the same dtype, but under torch.autocast, where both are cast to its dtype.
        labels: [N] int64, already shifted; or [B, T], -100 where there is nothing to score.
        options: what the model does to its logits, and the backend.

    Returns:
        [N] or [B, T] fp32 (fp64 for fp64 inputs), in nats, 0 where the label is -100;
        differentiable for any upstream gradient.

    Raises:
        ValueError: shapes, dtypes or devices don't belong together, a label is out of range (seen
            on the CPU, on a device with DPOFAST_CHECK_LABELS=1), or the backend can't be had.
        RuntimeError: Triton was asked for and isn't installed.

    Numerics: logits are made and kept in fp32; gradients accumulate in fp32 and come back in the
    inputs' dtypes. The backward makes the logits again: 8NHV operations in all.
    """
    if isinstance(hidden_states, Tensor) and hidden_states.dim() == 3:
        return _padded_logps(hidden_states, weight, labels, options)
    check_head_inputs(hidden_states, weight, labels, options)
    backend = backend_for(hidden_states, options)
    dtype = compute_dtype(hidden_states, weight)
    if backend == "naive":
        return _naive(naive_linear_logps, hidden_states, weight, labels, options, dtype)
    call = HeadCall(labels, options, dtype, backend, torch.is_grad_enabled())
    return apply_linear_logps(hidden_states, weight, options.bias, call)


def linear_scores(
    hidden_states: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [N]
    options: HeadOptions = DEFAULT_OPTIONS,
) -> Tensor:
    """Per-token log-probs of `labels`, and the log-sum-exp of the finished logits; forward only.

    Args:
        hidden_states, weight, labels, options: as of `linear_logps`, the first as [N, H].

    Returns:
        [2, N] fp32 (fp64 for fp64 inputs), without gradient: the log-probs, in nats and bit for bit
        those of `linear_logps`, and log sum exp z, z the logits that `HeadOptions` describes. Their
        sum is the label's own logit.

    Raises:
        ValueError, RuntimeError: as `linear_logps`.
    """
    check_head_inputs(hidden_states, weight, labels, options)
    backend = backend_for(hidden_states, options)
    dtype = compute_dtype(hidden_states, weight)
    with torch.no_grad():
        if backend == "naive":
            return _naive(naive_linear_scores, hidden_states, weight, labels, options, dtype)
        call = HeadCall(labels, options, dtype, backend, grad_enabled=False)
        return torch.stack(forward_only(hidden_states, weight, call))


def linear_pair_loss(
    hidden_states: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [N]
    bounds: Tensor,  # [2P+1]
    ref_logps: Tensor,  # [2P]
    loss: PairLoss,
    options: HeadOptions = DEFAULT_OPTIONS,
) -> PairLossOutput:
    """The loss summed over pairs; log-probs, loss and gradients in one pass over the logits.

    Args:
        hidden_states: [N, H] of the scored tokens, fp64, fp32, bf16 or fp16.
        weight: [V, H], the same dtype, but under torch.autocast, where both are cast to its dtype.
        labels: [N] int64, already shifted.
        bounds: [2P+1] int64, limits of chosen_0, rejected_0, chosen_1, ...; best on the CPU, as
            chunks are cut there. No sequence may be empty; no pairs at all give a loss of 0 and
            gradients of zero.
        ref_logps: [2P] summed log-probs of the reference, in nats; on any device.
        loss: from `make_loss`.
        options: what the model does to its logits, and the backend.

    Returns:
        The loss, differentiable once, and the summed log-probs.

    Raises:
        ValueError: shapes, dtypes or devices don't belong together, bounds don't cover the rows or
            are not of whole pairs, a sequence is empty, a label is out of range (seen on the CPU,
            on a device with DPOFAST_CHECK_LABELS=1), or the backend can't be had, or has no formula
            for the loss.
        TypeError: an argument is no tensor, no loss, or no options.
        RuntimeError: Triton was asked for and isn't installed.

    Numerics: logits are made and kept in fp32 (fp64 for fp64 inputs), sums per sequence and losses
    in fp64; gradients accumulate in fp32, are multiplied with the upstream gradient there, and come
    back in the inputs' dtypes.
    """
    check_head_inputs(hidden_states, weight, labels, options)
    limits = check_pairs(bounds, ref_logps, loss, len(labels))
    backend = backend_for(hidden_states, options)
    if backend in TRITON_BACKENDS:
        from dpofast_kernels.head.pairs_triton import formula_of

        formula_of(loss)  # raises where there is none
    dtype = compute_dtype(hidden_states, weight)
    if backend == "naive":
        per_token_logps = _naive(naive_linear_logps, hidden_states, weight, labels, options, dtype)
        return naive_pair_loss(per_token_logps, bounds, ref_logps, loss)
    device = hidden_states.device
    pairs = Pairs(
        bounds.to(device, non_blocking=True),
        limits,
        ref_logps.detach().to(device, torch.float64, non_blocking=True),
        loss,
    )
    call = HeadCall(labels, options, dtype, backend, torch.is_grad_enabled(), pairs)
    return PairLossOutput(*apply_linear_pair_loss(hidden_states, weight, options.bias, call))


def _padded_logps(
    hidden_states: Tensor,  # [B, T, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [B, T]
    options: HeadOptions,
) -> Tensor:
    """[B, T]: log-probs where there is a label, else 0."""
    check_padded_inputs(hidden_states, weight, labels)
    flat_labels = labels.flatten()  # [BT]
    rows = (flat_labels != IGNORED_LABEL).nonzero()[:, 0]  # [N]
    scored = hidden_states.flatten(0, 1).index_select(0, rows)  # [N, H]
    logps = linear_logps(scored, weight, flat_labels[rows], options)  # [N]
    return logps.new_zeros(len(flat_labels)).index_copy(0, rows, logps).view(labels.shape)


def _naive(
    op: Callable[[Tensor, Tensor, Tensor, HeadOptions], Tensor],
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    options: HeadOptions,
    dtype: torch.dtype,
) -> Tensor:
    """One of the plain twins, its inputs cast as the other backends cast them."""
    with torch.autocast(hidden_states.device.type, enabled=False):
        bias = None if options.bias is None else options.bias.to(dtype)
        cast = replace(options, bias=bias)
        return op(hidden_states.to(dtype), weight.to(dtype), labels, cast)


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _is_interpreted() -> bool:
    from dpofast_kernels.head.rows_triton import is_interpreted

    return is_interpreted()
