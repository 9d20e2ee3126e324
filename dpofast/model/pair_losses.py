"""The losses of single pairs or answers, from log-probs that the head's op has computed."""

from __future__ import annotations

from torch import Tensor

from dpofast.data.packing.answers import PackedAnswers
from dpofast.data.packing.batch import PackedPairs
from dpofast_kernels import PairLoss, PreferenceLoss, UnpairedLoss


def pair_losses(
    loss: PairLoss,
    logratios: Tensor,  # [2P]
    lengths: Tensor,  # [P, 2]
    weights: Tensor | None = None,  # [P]
    label_confidence: Tensor | None = None,  # [P]
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses that `linear_pair_loss` adds up, and their derivatives.

    Args:
        loss: the loss.
        logratios: [2P] fp64, log-ratios of chosen and rejected in turn, in nats.
        lengths: [P, 2] int64, scored tokens of chosen and rejected.
        weights: [P] fp64, factors of the losses; None for 1.
        label_confidence: [P] fp64, in place of one minus the loss's label smoothing; None for that.

    Returns:
        weight * loss, and its derivatives by the log-ratios of chosen and of rejected: [P] each.
    """
    inputs = (logratios[0::2], logratios[1::2], lengths)
    if label_confidence is None:
        losses, d_chosen, d_rejected = loss.pair_loss(*inputs)
    else:
        losses, d_chosen, d_rejected = loss.smoothed_loss(*inputs, 1.0 - label_confidence)
    if weights is None:
        return losses, d_chosen, d_rejected
    return weights * losses, weights * d_chosen, weights * d_rejected


def batch_losses(
    loss: PreferenceLoss,
    logps: Tensor,  # [S]
    batch: PackedPairs,
    pair_weights: Tensor | None = None,  # [P]
) -> tuple[Tensor, ...]:
    """The losses of a micro-batch with these log-probs, on their device.

    A loss that couples pairs is that of these pairs together.

    Args:
        loss: the loss; an UnpairedLoss for PackedAnswers.
        logps: [S], log-probs of the answers.
        batch: the micro-batch, with its reference log-probs.
        pair_weights: [P] fp64, WPO's weights, as the head's op has computed them; None for 1, as
            always with a loss that couples pairs.

    Returns:
        As `pair_losses`; or the loss of each single answer and its derivative, [S] each.
    """
    device = logps.device
    assert batch.ref_logps is not None
    if isinstance(batch, PackedAnswers):
        assert isinstance(loss, UnpairedLoss)
        return _answer_losses(loss, logps, batch)
    weights, confidence = (
        None if each is None else each.to(device)
        for each in (batch.weights, batch.label_confidence)
    )
    if pair_weights is not None:
        weights = pair_weights.detach() if weights is None else weights * pair_weights.detach()
    logratios = logps.detach().double() - batch.ref_logps.to(device)
    lengths = batch.lengths.to(device, non_blocking=True)
    if not isinstance(loss, PairLoss):
        refs = batch.ref_logps.to(device)
        own = logps.detach().double()
        return loss.losses_and_slopes(own[0::2], own[1::2], refs[0::2], refs[1::2], lengths)
    return pair_losses(loss, logratios, lengths, weights, confidence)


def _answer_losses(
    loss: UnpairedLoss,
    logps: Tensor,  # [S]
    batch: PackedAnswers,
) -> tuple[Tensor, Tensor]:
    assert batch.ref_logps is not None
    logratios = logps.detach().double() - batch.ref_logps.to(logps.device)
    z = logratios.new_zeros(()) if batch.z is None else batch.z.to(logratios)
    weights = None if batch.weights is None else batch.weights.to(logratios)
    return loss.sequence_loss(logratios, batch.is_desirable.to(logps.device), z, weights)
