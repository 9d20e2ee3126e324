"""What is logged of each pair."""

from __future__ import annotations

import torch
from torch import Tensor

METRIC_NAMES = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "logratios/chosen",
    "logratios/rejected",
)


def pair_metrics(
    logps: Tensor,  # [2P]
    ref_logps: Tensor,  # [2P]
    bounds: Tensor,  # [2P+1]
    beta: float,
) -> dict[str, Tensor]:
    """Rewards, log-probs and log-ratios of every pair, by the names that TRL logs them under.

    Args:
        logps: [2P] summed log-probs of the policy, in nats, chosen and rejected in turn.
        ref_logps: [2P] of the reference, on any device.
        bounds: [2P+1] int64 limits of the sequences, on any device; none may be empty.
        beta: of the loss; a reward is beta times a log-ratio.

    Returns:
        METRIC_NAMES in their order, [P] fp64 each, on the device of `logps`: rewards/chosen,
        rewards/rejected, rewards/margins, rewards/accuracies (1 where chosen is above rejected; a
        tie counts 0), logps/chosen, logps/rejected, and logratios/chosen, logratios/rejected (means
        per token).

    Raises:
        ValueError: the shapes don't belong together.
    """
    if logps.dim() != 1 or len(logps) % 2 or ref_logps.shape != logps.shape:
        raise ValueError(
            f"logps is {list(logps.shape)} and ref_logps {list(ref_logps.shape)}, expected both "
            "[2P]: chosen and rejected in turn."
        )
    if bounds.shape != (len(logps) + 1,):
        raise ValueError(f"bounds is {list(bounds.shape)}, expected [{len(logps) + 1}].")
    logps = logps.detach().double()
    logratios = logps - ref_logps.detach().to(logps)  # [2P]
    mean_logratios = logratios / bounds.to(logps.device).diff()
    rewards = beta * logratios
    chosen, rejected = slice(0, None, 2), slice(1, None, 2)
    values = (
        rewards[chosen],
        rewards[rejected],
        rewards[chosen] - rewards[rejected],
        (rewards[chosen] > rewards[rejected]).to(torch.float64),
        logps[chosen],
        logps[rejected],
        mean_logratios[chosen],
        mean_logratios[rejected],
    )
    return dict(zip(METRIC_NAMES, values, strict=True))
