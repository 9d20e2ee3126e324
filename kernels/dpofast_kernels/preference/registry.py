"""All losses, by name."""

from __future__ import annotations

import difflib

from dpofast_kernels.preference.hinge import HingeLoss
from dpofast_kernels.preference.ipo import IPOLoss
from dpofast_kernels.preference.loss import PairLoss
from dpofast_kernels.preference.sigmoid import SigmoidLoss

LOSSES: dict[str, type[PairLoss]] = {loss.name: loss for loss in (SigmoidLoss, HingeLoss, IPOLoss)}


def make_loss(name: str, beta: float = 0.1, label_smoothing: float = 0.0) -> PairLoss:
    """Make a loss by its name.

    Args:
        name: "sigmoid" (DPO; cDPO with label_smoothing above 0), "hinge" or "ipo".
        beta: strength of the pull towards the reference, above 0.
        label_smoothing: probability that a pair's labels are swapped, in [0, 0.5); only "sigmoid"
            takes it.

    Raises:
        TypeError: beta or label_smoothing is not a number.
        ValueError: the name is unknown, or an option is out of range.

    Example:
        >>> import torch
        >>> from dpofast_kernels import make_loss
        >>> loss = make_loss("sigmoid", beta=0.1)
        >>> zero, lengths = torch.zeros(1, dtype=torch.float64), torch.tensor([[5, 3]])
        >>> value, d_chosen, d_rejected = loss.pair_loss(zero, zero, lengths)
        >>> round(value.item(), 4), d_chosen.item(), d_rejected.item()  # log(2), -beta/2, beta/2
        (0.6931, -0.05, 0.05)
    """
    if not isinstance(name, str) or name not in LOSSES:
        # Only a typo is near enough: sigmoid_norm, a loss of its own, isn't a misspelt sigmoid.
        near = difflib.get_close_matches(str(name), LOSSES, n=1, cutoff=0.8)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"Unknown loss {name!r}.{hint} The losses are: {', '.join(sorted(LOSSES))}."
        )
    return LOSSES[name](beta=beta, label_smoothing=label_smoothing)
