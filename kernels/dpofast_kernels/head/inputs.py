"""Checks of the arguments of the head's public ops.

Every error names the argument, what it is and what was expected.
"""

from __future__ import annotations

import math
import os
from itertools import pairwise

import torch
from torch import Tensor

from dpofast_kernels.head.dtypes import accumulate_dtype
from dpofast_kernels.head.options import NO_EXTRAS, Answers, HeadOptions, PairExtras
from dpofast_kernels.head.sequences import check_bounds
from dpofast_kernels.head.statistics import check_statistics
from dpofast_kernels.preference import (
    CoupledLoss,
    PairLoss,
    PairWeighting,
    PreferenceLoss,
    UnpairedLoss,
)

# Environment variable: 1 checks labels on GPUs, too, although the host has to wait for it.
CHECK_LABELS = "DPOFAST_CHECK_LABELS"
IGNORED_LABEL = -100


def check_head_inputs(
    hidden_states: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [N]
    options: HeadOptions,
) -> None:
    """Check types, shapes, dtypes, devices and labels of one call.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the arguments don't match, or a label is out of range.
    """
    _check_types(hidden_states=hidden_states, weight=weight, labels=labels)
    if not isinstance(options, HeadOptions):
        raise TypeError(f"options is a {type(options).__name__}, expected HeadOptions.")
    if hidden_states.dim() != 2:
        raise ValueError(f"hidden_states is {list(hidden_states.shape)}, expected [N, H].")
    if weight.dim() != 2 or weight.shape[1] != hidden_states.shape[1]:
        raise ValueError(
            f"weight is {list(weight.shape)}, expected [V, {hidden_states.shape[1]}], as "
            f"hidden_states is {list(hidden_states.shape)}."
        )
    if labels.shape != hidden_states.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels is {list(labels.shape)} {labels.dtype}, expected "
            f"[{hidden_states.shape[0]}] torch.int64, one for each hidden state."
        )
    _check_tensor("weight", weight, hidden_states.device, weight.shape)
    _check_tensor("labels", labels, hidden_states.device, labels.shape)
    _check_tensor("bias", options.bias, hidden_states.device, weight.shape[:1], weight.dtype)
    weight_grad, grad_dtype = options.weight_grad, accumulate_dtype(weight.dtype)
    _check_tensor("weight_grad", weight_grad, hidden_states.device, weight.shape, grad_dtype)
    if weight_grad is not None and not weight_grad.is_contiguous():
        raise ValueError(
            f"weight_grad has strides {weight_grad.stride()}, expected a contiguous buffer."
        )
    check_labels(labels, weight.shape[0])


def check_padded_inputs(
    hidden_states: Tensor,  # [B, T, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [B, T]
) -> None:
    """Check the labels of a padded batch: every position has a label or IGNORED_LABEL.

    `check_head_inputs` checks the rest, once the scored positions are gathered.

    Raises:
        TypeError: weight or labels is not a tensor.
        ValueError: wrong shape, dtype or device, or a label out of range.
    """
    _check_types(weight=weight, labels=labels)
    if labels.shape != hidden_states.shape[:2] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels is {list(labels.shape)} {labels.dtype}, expected "
            f"{list(hidden_states.shape[:2])} torch.int64, as hidden_states is "
            f"{list(hidden_states.shape)}; {IGNORED_LABEL} where there is nothing to score."
        )
    _check_tensor("labels", labels, hidden_states.device, labels.shape)
    if weight.dim() == 2:  # check_head_inputs refuses any other weight
        check_labels(labels, len(weight), (labels != IGNORED_LABEL))


def _check_types(**tensors: object) -> None:
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}, expected a tensor.")


def check_labels(labels: Tensor, vocab_size: int, scored: Tensor | None = None) -> None:
    """Check that labels are in the vocabulary; off the CPU only with DPOFAST_CHECK_LABELS=1.

    Args:
        labels: any shape, int64.
        vocab_size: labels run from 0 to vocab_size - 1.
        scored: bool, shaped like `labels`, False for labels to skip; None checks all labels.

    Raises:
        ValueError: a label is out of range.
    """
    if labels.device.type != "cpu" and os.environ.get(CHECK_LABELS) != "1":
        return
    wrong = (labels < 0) | (labels >= vocab_size)
    if scored is not None:
        wrong &= scored
    if wrong.any():
        place = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"labels{place} is {int(labels[tuple(place)])}, expected 0 to {vocab_size - 1}, as "
            f"weight has {vocab_size} rows."
        )


def check_pairs(
    bounds: Tensor,  # [S+1]
    ref_logps: Tensor,  # [S]
    loss: PreferenceLoss,
    num_rows: int,
    extras: PairExtras = NO_EXTRAS,
) -> list[int]:
    """Check the arguments of `linear_pair_loss` that describe its sequences and pairs.

    Args:
        bounds: [S+1] int64, bounds of the sequences.
        ref_logps: [S], summed log-probs of the reference.
        loss: any loss from `make_loss`.
        num_rows: scored tokens in all sequences.
        extras: what else describes them.

    Returns:
        The bounds as a list.

    Raises:
        TypeError: an argument is not a tensor, loss is not a PairLoss, or weighting is not a
            PairWeighting.
        ValueError: an odd number of sequences, an empty sequence, bounds that don't cover the rows,
            pairs that aren't two sequences, not one reference log-prob for each sequence, or an
            extra of a wrong shape, dtype or value.
    """
    _check_types(bounds=bounds, ref_logps=ref_logps)
    if not isinstance(loss, PairLoss):
        couples = isinstance(loss, CoupledLoss)
        which = ", which couples pairs: find its derivatives first" if couples else ""
        raise TypeError(f"loss is a {type(loss).__name__}{which}, expected one from make_loss.")
    limits = check_bounds(bounds, num_rows)
    num_sequences, pairs = len(limits) - 1, extras.pairs
    if pairs is not None:
        _check_indices(pairs, num_sequences)
    elif num_sequences % 2:
        raise ValueError(
            f"bounds are of {num_sequences} sequences, expected an even number: each chosen "
            "followed by its rejected."
        )
    for index in range(num_sequences):
        if limits[index] == limits[index + 1]:
            which = f" ({'rejected' if index % 2 else 'chosen'} of pair {index // 2})"
            raise ValueError(
                f"sequence {index}{which if pairs is None else ''} has no scored token; leave such "
                "pairs out."
            )
    if ref_logps.shape != (num_sequences,) or not ref_logps.is_floating_point():
        raise ValueError(
            f"ref_logps is {list(ref_logps.shape)} {ref_logps.dtype}, expected "
            f"[{num_sequences}] of a floating dtype, one for each sequence."
        )
    num_pairs = num_sequences // 2 if pairs is None else len(pairs)
    _check_factors(extras, loss, num_pairs, num_sequences, num_rows)
    check_statistics(extras.statistics)
    if not isinstance(extras.weighting, PairWeighting | None):
        raise TypeError(
            f"weighting is a {type(extras.weighting).__name__}, expected a PairWeighting or None."
        )
    return limits


def check_singles(answers: Answers, loss: UnpairedLoss, num_rows: int) -> list[int]:
    """Check the arguments of `linear_sequence_loss` that describe its sequences.

    Returns:
        The bounds as a list.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a sequence is empty, the bounds don't cover the rows, or a tensor has the wrong
            shape, dtype or value.
    """
    bounds, ref_logps, is_desirable = answers.bounds, answers.ref_logps, answers.is_desirable
    _check_types(bounds=bounds, ref_logps=ref_logps, is_desirable=is_desirable)
    if not isinstance(loss, UnpairedLoss):
        raise TypeError(f"loss is a {type(loss).__name__}, expected one from make_unpaired_loss.")
    limits = check_bounds(bounds, num_rows)
    num_sequences = len(limits) - 1
    for index, (start, end) in enumerate(pairwise(limits)):
        if start == end:
            raise ValueError(f"sequence {index} has no scored token; leave it out.")
    if is_desirable.shape != (num_sequences,) or is_desirable.dtype != torch.bool:
        raise ValueError(
            f"is_desirable is {list(is_desirable.shape)} {is_desirable.dtype}, expected "
            f"[{num_sequences}] torch.bool, one for each sequence."
        )
    if ref_logps.shape != (num_sequences,) or not ref_logps.is_floating_point():
        raise ValueError(
            f"ref_logps is {list(ref_logps.shape)} {ref_logps.dtype}, expected "
            f"[{num_sequences}] of a floating dtype, one for each sequence."
        )
    if answers.z is not None:
        _check_types(z=answers.z)
        if answers.z.shape != () or not answers.z.is_floating_point():
            raise ValueError(
                f"z is {list(answers.z.shape)} {answers.z.dtype}, expected [] of a floating dtype."
            )
    _check_factor("weights", answers.weights, num_sequences, 0.0)
    return limits


def _check_indices(pairs: Tensor, num_sequences: int) -> None:
    _check_types(pairs=pairs)
    if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.dtype != torch.int64:
        raise ValueError(
            f"pairs is {list(pairs.shape)} {pairs.dtype}, expected [P, 2] torch.int64."
        )
    for index, (chosen, rejected) in enumerate(pairs.tolist()):
        if not (0 <= chosen < num_sequences and 0 <= rejected < num_sequences):
            raise ValueError(
                f"pairs[{index}] is {[chosen, rejected]}, expected numbers of the "
                f"{num_sequences} sequences."
            )
        if chosen == rejected:
            raise ValueError(
                f"pairs[{index}] is {[chosen, rejected]}, expected two different sequences."
            )


def _check_factors(
    extras: PairExtras, loss: PairLoss, num_pairs: int, num_sequences: int, num_rows: int
) -> None:
    if extras.label_confidence is not None and not loss.takes_label_smoothing:
        raise ValueError(
            f"label_confidence is given, but the {loss.name} loss has no label smoothing; leave it "
            "out or choose a loss that has it, such as sigmoid."
        )
    _check_factor("weights", extras.weights, num_pairs, 0.0)
    _check_factor("label_confidence", extras.label_confidence, num_pairs, 0.0, 1.0)
    _check_factor("coefficients", extras.coefficients, num_sequences)
    _check_factor("token_weights", extras.token_weights, num_rows)


def _check_factor(
    name: str, factor: Tensor | None, size: int, low: float = -math.inf, high: float = math.inf
) -> None:
    if factor is None:
        return
    _check_types(**{name: factor})
    if factor.shape != (size,) or not factor.is_floating_point():
        raise ValueError(
            f"{name} is {list(factor.shape)} {factor.dtype}, expected [{size}] of a floating dtype."
        )
    if factor.device.type != "cpu" and os.environ.get(CHECK_LABELS) != "1":
        return
    wrong = ~(factor.isfinite() & (factor >= low) & (factor <= high))
    if wrong.any():
        place = int(wrong.nonzero()[0])
        limits = "" if low == -math.inf else f" of at least {low:g}"
        limits += "" if high == math.inf else f" and at most {high:g}"
        raise ValueError(
            f"{name}[{place}] is {float(factor[place]):g}, expected a finite number{limits}."
        )


def _check_tensor(
    name: str,
    tensor: Tensor | None,
    device: torch.device,
    shape: torch.Size,
    dtype: torch.dtype | None = None,
) -> None:
    if tensor is None:
        return
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, but hidden_states on {device}.")
    if tensor.shape != shape or (dtype is not None and tensor.dtype != dtype):
        raise ValueError(
            f"{name} is {list(tensor.shape)} {tensor.dtype}, expected {list(shape)} {dtype}."
        )
