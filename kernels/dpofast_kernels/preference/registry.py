"""Every loss by its name."""

from __future__ import annotations

import difflib

from dpofast_kernels.preference.hinge import HingeLoss
from dpofast_kernels.preference.ipo import IPOLoss
from dpofast_kernels.preference.loss import PairLoss
from dpofast_kernels.preference.sigmoid import SigmoidLoss

LOSSES: dict[str, type[PairLoss]] = {loss.name: loss for loss in (SigmoidLoss, HingeLoss, IPOLoss)}


def make_loss(name: str, beta: float = 0.1, label_smoothing: float = 0.0) -> PairLoss:
    """The loss of that name.

    Args:
        name: "sigmoid" (DPO; cDPO with label_smoothing above 0), "hinge" or "ipo".
        beta: above 0.
        label_smoothing: in [0, 0.5), with sigmoid only.

    Raises:
        TypeError: beta or label_smoothing is no number.
        ValueError: an unknown name, or an option out of range.
    """
    if not isinstance(name, str) or name not in LOSSES:
        near = difflib.get_close_matches(str(name), LOSSES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"Unknown loss {name!r}.{hint} The losses are: {', '.join(sorted(LOSSES))}."
        )
    return LOSSES[name](beta=beta, label_smoothing=label_smoothing)
