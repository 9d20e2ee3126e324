"""The public ops: they check their inputs, choose a back end and enter autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from dpofast_kernels.head.autograd import (
    HeadCall,
    apply_linear_logps,
    apply_linear_pair_loss,
    forward_only,
)
from dpofast_kernels.head.backends import DEFAULT_OPTIONS, backend_for
from dpofast_kernels.head.dtypes import compute_dtype
from dpofast_kernels.head.inputs import (
    IGNORED_LABEL,
    check_head_inputs,
    check_padded_inputs,
    check_pairs,
)
from dpofast_kernels.head.naive import (
    naive_linear_logps,
    naive_linear_scores,
    naive_linear_statistics,
    naive_pair_loss,
)
from dpofast_kernels.head.options import NO_EXTRAS, HeadOptions, PairExtras, PairLossOutput
from dpofast_kernels.head.pairs import Incidence, Pairs
from dpofast_kernels.head.statistics import STATISTICS, check_statistics
from dpofast_kernels.preference import PairLoss


def linear_logps(
    hidden_states: Tensor,  # [N, H] or [B, T, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [N] or [B, T]
    options: HeadOptions = DEFAULT_OPTIONS,
) -> Tensor:
    """Per-token log-probs of `labels`, without materialising the logits.

    Args:
        hidden_states: [N, H] fp64, fp32, bf16 or fp16; or [B, T, H], of which only the positions
            with a label are computed. Finding them makes the host wait for a GPU.
        weight: [V, H], same dtype. Under torch.autocast the dtypes may differ, and both are cast to
            the autocast dtype.
        labels: [N] int64, already shifted; or [B, T], -100 where there is nothing to score.
        options: what the model does to its logits, and the back end.

    Returns:
        [N] or [B, T] fp32 (fp64 for fp64 inputs), in nats; in [B, T], 0 where the label is -100.
        Differentiable once, for any upstream gradient.

    Raises:
        ValueError: shapes, dtypes or devices don't match, a label is out of range (off the CPU this
            is checked only with DPOFAST_CHECK_LABELS=1), or the back end can't run.

    Numerics: logits are computed and kept in fp32 (fp64 for fp64 inputs). Gradients accumulate in
    fp32 and are returned in the inputs' dtypes. The backward computes the logits again: 8NHV
    operations in all.

    Example:
        >>> import torch
        >>> from dpofast_kernels import linear_logps
        >>> hidden_states, weight = torch.zeros(3, 16), torch.zeros(4, 16)  # N 3, H 16, V 4
        >>> labels = torch.tensor([3, 0, 2])
        >>> linear_logps(hidden_states, weight, labels)  # equal logits: log(1/4)
        tensor([-1.3863, -1.3863, -1.3863])
    """
    if isinstance(hidden_states, Tensor) and hidden_states.dim() == 3:
        return _padded_logps(hidden_states, weight, labels, options)
    check_head_inputs(hidden_states, weight, labels, options)
    dtype = compute_dtype(hidden_states, weight)
    backend = backend_for(weight, options, dtype)
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
        hidden_states: [N, H].
        weight, labels, options: as in `linear_logps`.

    Returns:
        [2, N] fp32 (fp64 for fp64 inputs), without gradient. First come the log-probs in nats, the
        same bits as from `linear_logps`. Then come the log-sum-exps of the finished logits (see
        `HeadOptions`). A log-prob plus its log-sum-exp is the label's own logit.

    Raises:
        ValueError: as in `linear_logps`.

    Example:
        >>> import torch
        >>> from dpofast_kernels import linear_scores
        >>> hidden_states, weight = torch.zeros(3, 16), torch.zeros(4, 16)  # N 3, H 16, V 4
        >>> logps, logsumexps = linear_scores(hidden_states, weight, torch.tensor([3, 0, 2]))
        >>> logsumexps  # log(4)
        tensor([1.3863, 1.3863, 1.3863])
    """
    check_head_inputs(hidden_states, weight, labels, options)
    dtype = compute_dtype(hidden_states, weight)
    backend = backend_for(weight, options, dtype)
    with torch.no_grad():
        if backend == "naive":
            return _naive(naive_linear_scores, hidden_states, weight, labels, options, dtype)
        call = HeadCall(labels, options, dtype, backend, grad_enabled=False)
        return torch.stack(forward_only(hidden_states, weight, call)[:2])


def linear_statistics(
    hidden_states: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [N]
    statistics: tuple[str, ...] = STATISTICS,
    options: HeadOptions = DEFAULT_OPTIONS,
) -> Tensor:
    """Statistics of the softmax p of each row's finished logits z; forward only.

    Args:
        hidden_states: [N, H].
        weight, labels, options: as in `linear_logps`.
        statistics: K names, at least one:
            "entropy": -sum(p ln p) over the vocabulary, in nats.
            "mean_logit": the mean of z over the vocabulary. It is -inf if a bias rules a token out
                and no cap makes its logit finite.
            "is_top": 1 if the label's logit is the maximum, else 0. At a tie it is 1, where argmax
                would pick the first token.
            "log_sum_p2": ln sum(p^2) over the vocabulary. WPO subtracts it from the label's
                log-prob (arXiv:2406.11827, equation 2).

    Returns:
        [K, N] fp32 (fp64 for fp64 inputs), in the order of `statistics`, without gradient.

    Raises:
        ValueError: as in `linear_logps`.
        ValueError: a statistic is unknown or named twice, or none is named.
        TypeError: `statistics` is not a tuple of strings.

    Numerics: sums over blocks of the vocabulary are in fp32 (fp64 for fp64 inputs), formulas on
    sums in fp64. If the label has nearly all probability, the small entropy keeps its digits.

    Example:
        >>> import torch
        >>> from dpofast_kernels import linear_statistics
        >>> hidden_states, weight = torch.zeros(3, 16), torch.zeros(4, 16)  # N 3, H 16, V 4
        >>> labels = torch.tensor([3, 0, 2])
        >>> linear_statistics(hidden_states, weight, labels, ("entropy", "log_sum_p2"))
        tensor([[ 1.3863,  1.3863,  1.3863],
                [-1.3863, -1.3863, -1.3863]])
    """
    check_head_inputs(hidden_states, weight, labels, options)
    check_statistics(statistics)
    if not statistics:
        raise ValueError(f"statistics is empty: name at least one of {', '.join(STATISTICS)}.")
    dtype = compute_dtype(hidden_states, weight)
    backend = backend_for(weight, options, dtype)
    with torch.no_grad():
        if backend == "naive":
            op = partial(naive_linear_statistics, statistics=statistics)
            return _naive(op, hidden_states, weight, labels, options, dtype)
        call = HeadCall(labels, options, dtype, backend, grad_enabled=False, statistics=statistics)
        return forward_only(hidden_states, weight, call)[2]


def linear_pair_loss(
    hidden_states: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [N]
    bounds: Tensor,  # [S+1]
    ref_logps: Tensor,  # [S]
    loss: PairLoss,
    options: HeadOptions = DEFAULT_OPTIONS,
    extras: PairExtras = NO_EXTRAS,
) -> PairLossOutput:
    """Loss summed over pairs; log-probs, loss and gradients come from one pass over the logits.

    The loss is sum over pairs of weight * loss(chosen, rejected), plus sum over sequences of
    coefficient * logp. With a weighting, the weight of a pair is multiplied with WPO's weight.

    Args:
        hidden_states: [N, H], one for each scored token; fp64, fp32, bf16 or fp16.
        weight: [V, H], same dtype. Under torch.autocast the dtypes may differ, and both are cast to
            the autocast dtype.
        labels: [N] int64, already shifted.
        bounds: [S+1] int64, bounds of the sequences; best passed on the CPU, because chunks are cut
            there. No sequence may be empty. Without sequences the loss is 0 and the gradients are
            zero.
        ref_logps: [S] summed log-probs of the reference, in nats; on any device.
        loss: a loss from `make_loss` or `make_custom_loss`, or any other `PairLoss`. `ZeroLoss`
            trains the coefficients only.
        options: what the model does to its logits, the upstream gradient, and the back end.
        extras: which sequences the pairs are, weights, soft labels and coefficients, and statistics
            to sum over each sequence.

    Returns:
        The loss (differentiable once), the summed log-probs [S] and the metrics [8, P]; and, if
        asked for, summed statistics [K, S] and WPO's weights [P].

    Raises:
        ValueError: shapes, dtypes or devices don't match, the bounds don't cover the rows, a
            sequence is empty, the pairs don't fit the sequences, or the back end can't run. A label
            or an extra is out of range (off the CPU this is checked only with
            DPOFAST_CHECK_LABELS=1).
        TypeError: an argument has the wrong type.

    Numerics: logits are computed and kept in fp32 (fp64 for fp64 inputs), sums per sequence and
    losses in fp64. Gradients accumulate in fp32, are multiplied by the upstream gradient in
    fp32, and are rounded to the inputs' dtypes last. With `options.upstream`, the gradient of a
    bf16 weight may be rounded as soon as it is made.

    Example:
        >>> import torch
        >>> from dpofast_kernels import linear_pair_loss, make_loss
        >>> hidden_states = torch.randn(5, 16, requires_grad=True)  # N 5, H 16
        >>> weight = torch.randn(100, 16, requires_grad=True)  # V 100
        >>> labels = torch.randint(100, (5,))
        >>> bounds = torch.tensor([0, 3, 5])  # one pair: 3 chosen tokens, 2 rejected ones
        >>> ref_logps = torch.tensor([-14.0, -9.0])
        >>> loss = make_loss("sigmoid", beta=0.1)
        >>> output = linear_pair_loss(hidden_states, weight, labels, bounds, ref_logps, loss)
        >>> output.loss.backward()
        >>> output.logps.shape, output.metrics.shape, weight.grad.shape
        (torch.Size([2]), torch.Size([8, 1]), torch.Size([100, 16]))
    """
    check_head_inputs(hidden_states, weight, labels, options)
    limits = check_pairs(bounds, ref_logps, loss, len(labels), extras)
    pairs = _pairs_on(hidden_states.device, bounds, limits, ref_logps, loss, extras)
    output = _pair_loss(hidden_states, weight, labels, options, pairs)
    return _as_asked(output, len(extras.statistics))


def _pair_loss(
    hidden_states: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [N]
    options: HeadOptions,
    pairs: Pairs,
) -> PairLossOutput:
    dtype, names = compute_dtype(hidden_states, weight), pairs.statistics
    backend = backend_for(weight, options, dtype)
    if backend == "naive":
        inputs = (hidden_states, weight, labels, options, dtype)
        per_token_logps, statistics = _naive(naive_linear_logps, *inputs), None
        if names:
            op = partial(naive_linear_statistics, statistics=names)
            statistics = _naive(op, *inputs).detach()
        return naive_pair_loss(per_token_logps, pairs, statistics)
    call = HeadCall(labels, options, dtype, backend, torch.is_grad_enabled(), pairs, names)
    return PairLossOutput(*apply_linear_pair_loss(hidden_states, weight, options.bias, call))


def _as_asked(output: PairLossOutput, num_statistics: int) -> PairLossOutput:
    """The output without the statistics after the first ones, which only the weighting needed."""
    statistics = output.statistics
    if statistics is None or len(statistics) == num_statistics:
        return output
    return replace(output, statistics=statistics[:num_statistics] if num_statistics else None)


def _pairs_on(
    device: torch.device,
    bounds: Tensor,  # [S+1]
    limits: list[int],
    ref_logps: Tensor,  # [S]
    loss: PairLoss,
    extras: PairExtras,
) -> Pairs:
    """The pairs of a call, on a device and in fp64, without gradients or waiting for the copies."""

    def moved(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device, torch.float64, non_blocking=True)

    def moved_if_any(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else moved(tensor)

    of_pairs, confidence, names = extras.pairs, extras.label_confidence, extras.statistics
    if extras.weighting is not None and "log_sum_p2" not in names:
        names = (*names, "log_sum_p2")
    return Pairs(
        bounds.to(device, non_blocking=True),
        limits,
        moved(ref_logps),
        loss,
        None if of_pairs is None else Incidence.on(device, of_pairs.cpu(), len(limits) - 1),
        weights=moved_if_any(extras.weights),
        smoothing=None if confidence is None else 1.0 - moved(confidence),
        coefficients=moved_if_any(extras.coefficients),
        token_weights=moved_if_any(extras.token_weights),
        weighting=extras.weighting,
        statistics=names,
    )


def _padded_logps(
    hidden_states: Tensor,  # [B, T, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [B, T]
    options: HeadOptions,
) -> Tensor:
    """[B, T] log-probs, 0 where there is no label."""
    check_padded_inputs(hidden_states, weight, labels)
    flat_labels = labels.flatten()  # [BT]
    # nonzero waits for a GPU, because the host must know N to allocate the result.
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
    """Run a naive op on inputs cast to `dtype`, as every back end casts them."""
    with torch.autocast(hidden_states.device.type, enabled=False):
        bias = None if options.bias is None else options.bias.to(dtype)
        cast = replace(options, bias=bias)
        return op(hidden_states.to(dtype), weight.to(dtype), labels, cast)
