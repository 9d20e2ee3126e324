"""Tries a user's loss on random pairs, before anything is trained with it.

The head knows only the pairs of a chunk, and turns the loss of each pair into gradients at once. A
loss that compares pairs with each other would depend on how many of them fit a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dpofast_kernels.preference.coupled import CoupledCustomLoss
from dpofast_kernels.preference.custom import CustomLoss, NotAPairLossError, PairFunction

PAIRS_TRIED = (33, 8, 3, 2, 1)
COUPLED_TRIED = (33, 8, 2)  # a function of several pairs needn't be defined for one
SPREAD = 3.0  # of the log-ratios tried, in nats
# Whole and pair by pair, PyTorch may use other instructions: a few digits can differ.
RTOL, ATOL = 1e-9, 1e-12

Inputs = tuple[Tensor, Tensor, Tensor]  # as a PairFunction takes them


def make_custom_loss(
    function: PairFunction, beta: float = 0.1, device: torch.device | str = "cpu"
) -> CustomLoss:
    """Make a loss of a function, and check that it is one.

    The function is called on random log-ratios, on all pairs at once and on each pair alone. Losses
    and derivatives must be the same.

    Args:
        function: (chosen log-ratios [P] fp64, rejected log-ratios [P] fp64, lengths [P, 2] int64)
            -> losses [P] fp64. A log-ratio is the policy's log-prob of an answer minus the
            reference's, in nats. The function must be differentiable, and no pair may depend on
            another one. It scales the log-ratios by a beta of its own.
        beta: factor of the rewards in the metrics; the function doesn't get it.
        device: device to try the function on.

    Raises:
        TypeError: the function can't be called, or beta isn't a number.
        NotAPairLossError: the function fails, returns no tensor or one of another shape or dtype,
            has no gradient, isn't finite, returns something else the second time, or couples pairs.
        ValueError: beta is out of range.

    Example:
        >>> import torch
        >>> from dpofast_kernels import make_custom_loss
        >>> def squared(chosen_logratios, rejected_logratios, lengths):
        ...     return (chosen_logratios - rejected_logratios - 1.0).square()
        >>> loss = make_custom_loss(squared)
        >>> zero, lengths = torch.zeros(1, dtype=torch.float64), torch.tensor([[5, 3]])
        >>> [value.item() for value in loss.pair_loss(zero, zero, lengths)]
        [1.0, -2.0, 2.0]
    """
    loss = CustomLoss(beta=beta, function=function)
    for inputs in _inputs(torch.device(device), PAIRS_TRIED):
        _check_alone(loss, inputs)
    return loss


def make_coupled_custom_loss(
    function: PairFunction, beta: float = 0.1, device: torch.device | str = "cpu"
) -> CoupledCustomLoss:
    """Make a loss of a function in which the loss of a pair may depend on the other pairs.

    The function is called on random log-ratios of 33, 8 and 2 pairs, and on log-ratios of 0.

    Args:
        function, beta, device: as in `make_custom_loss`; but pairs may depend on each other.

    Raises:
        TypeError: the function can't be called, or beta isn't a number.
        NotAPairLossError: the function fails, returns no tensor or one of another shape or dtype,
            has no gradient, isn't finite, or returns something else the second time.
        ValueError: beta is out of range.
    """
    loss = CoupledCustomLoss(beta=beta, function=function)
    for inputs in _inputs(torch.device(device), COUPLED_TRIED):
        _check_whole(loss, inputs)
    return loss


def _inputs(device: torch.device, tried: tuple[int, ...]) -> Iterator[Inputs]:
    generator = torch.Generator().manual_seed(0)
    for num_pairs in tried:
        drawn = torch.randn(2, num_pairs, generator=generator, dtype=torch.float64)
        lengths = torch.randint(1, 500, (num_pairs, 2), generator=generator).to(device)
        for spread in (SPREAD, 0.0):  # 0 is where a policy begins that is its own reference
            logratios = (spread * drawn).to(device)
            yield logratios[0], logratios[1], lengths


def _check_alone(loss: CustomLoss, inputs: Inputs) -> None:
    whole = _check_finite(loss, inputs)
    chosen, rejected, lengths = inputs
    slices = [slice(pair, pair + 1) for pair in range(len(chosen))]
    each = [_values(loss, (chosen[pair], rejected[pair], lengths[pair])) for pair in slices]
    if not torch.allclose(torch.cat(each, 1), whole, RTOL, ATOL):
        raise NotAPairLossError(
            f"it couples pairs: for {len(inputs[0])} pairs together it gave other losses or "
            "derivatives than for each pair alone. If it is meant to, give it as "
            "CoupledFunction(function): it then gets all pairs of a step, at the price of one more "
            "forward pass. Otherwise a pair's loss may depend on this pair only, because the pairs "
            "of a step are computed a few at a time."
        )
    _check_slope(whole, inputs)


def _check_whole(loss: CoupledCustomLoss, inputs: Inputs) -> None:
    _check_slope(_check_finite(loss, inputs), inputs)


def _check_slope(values: Tensor, inputs: Inputs) -> None:
    if inputs[0].any() and not values[1:].any():
        raise NotAPairLossError("its gradient is 0 for every pair, so it would train nothing.")


def _check_finite(loss: CustomLoss | CoupledCustomLoss, inputs: Inputs) -> Tensor:
    """[3, P]: losses and both derivatives, which are finite and the same when asked for again."""
    whole = _values(loss, inputs)
    _check_closed(loss, inputs)
    if not whole.isfinite().all():
        pair = int((~whole.isfinite().all(0)).nonzero()[0])
        values = ", ".join(f"{value:g}" for value in whole[:, pair].tolist())
        raise NotAPairLossError(
            f"its loss or derivatives aren't finite ({values}) at the log-ratios "
            f"{inputs[0][pair]:.3g} and {inputs[1][pair]:.3g}; log-ratios have both signs, and are "
            "0 before the first step."
        )
    if not torch.equal(_values(loss, inputs), whole):
        raise NotAPairLossError(
            "it returned something else for the same pairs the second time; it may neither draw "
            "random numbers nor keep a state."
        )
    return whole


def _values(loss: CustomLoss | CoupledCustomLoss, inputs: Inputs) -> Tensor:
    """[3, P]: losses and both derivatives.

    Raises:
        NotAPairLossError: the function failed, or returned something that is no loss.
    """
    try:
        chosen, rejected, lengths = inputs
        zeros = torch.zeros_like(chosen)  # a reference's log-probs: the log-ratios stay as they are
        return torch.stack(loss.losses_and_slopes(chosen, rejected, zeros, zeros, lengths))
    except NotAPairLossError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise NotAPairLossError(f"it failed for {len(inputs[0])} pairs ({reason}).") from error


def _check_closed(loss: CustomLoss | CoupledCustomLoss, inputs: Inputs) -> None:
    """Check that nothing but the log-ratios gets a gradient."""
    if loss.function(*inputs).requires_grad:
        raise NotAPairLossError(
            "it depends on other tensors that require gradients, and these would not be trained; "
            "detach them, or call requires_grad_(False)."
        )
