"""Metrics of each pair."""

from __future__ import annotations

import torch
from torch import Tensor

# Names of the 8 metrics in `PairLossOutput.metrics`, in its order.
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
    """Rewards, log-probs and log-ratios of every pair, under the names that TRL logs.

    Args:
        logps: [2P] summed log-probs of the policy, in nats, chosen and rejected in turn.
        ref_logps: [2P] summed log-probs of the reference, on any device.
        bounds: [2P+1] int64, bounds of the sequences, on any device. No sequence may be empty.
        beta: beta of the loss; a reward is beta times a log-ratio.

    Returns:
        [P] fp64 for each of METRIC_NAMES, in that order, on the device of `logps`. An accuracy is 1
        if the chosen reward is above the rejected one; a tie counts as 0. The logratios are means
        per token.

    Raises:
        ValueError: the shapes don't match.

    Example:
        >>> import torch
        >>> from dpofast_kernels import pair_metrics
        >>> logps, ref_logps = torch.tensor([-2.0, -3.5]), torch.tensor([-3.0, -3.0])
        >>> bounds = torch.tensor([0, 4, 6])  # 4 chosen tokens, 2 rejected ones
        >>> metrics = pair_metrics(logps, ref_logps, bounds, beta=0.5)
        >>> metrics["rewards/margins"].tolist(), metrics["logratios/chosen"].tolist()
        ([0.75], [0.25])
    """
    if logps.dim() != 1 or len(logps) % 2 or ref_logps.shape != logps.shape:
        raise ValueError(
            f"logps is {list(logps.shape)} and ref_logps {list(ref_logps.shape)}, expected both "
            "[2P]: chosen and rejected in turn."
        )
    if bounds.shape != (len(logps) + 1,):
        raise ValueError(f"bounds is {list(bounds.shape)}, expected [{len(logps) + 1}].")
    logps = logps.detach().double()
    ref_logps, lengths = ref_logps.detach().to(logps), bounds.to(logps.device).diff()
    return metrics_of_pairs(logps.view(-1, 2), ref_logps.view(-1, 2), lengths.view(-1, 2), beta)


def metrics_of_pairs(
    logps: Tensor,  # [P, 2]
    ref_logps: Tensor,  # [P, 2]
    lengths: Tensor,  # [P, 2]
    beta: float,
) -> dict[str, Tensor]:
    """`pair_metrics` of columns chosen and rejected: fp64, but int64 lengths, on one device."""
    logratios = logps - ref_logps  # [P, 2]
    mean_logratios, rewards = logratios / lengths, beta * logratios
    values = {
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards[:, 1],
        "rewards/margins": rewards[:, 0] - rewards[:, 1],
        "rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).to(torch.float64),
        "logps/chosen": logps[:, 0],
        "logps/rejected": logps[:, 1],
        "logratios/chosen": mean_logratios[:, 0],
        "logratios/rejected": mean_logratios[:, 1],
    }
    return {name: values[name] for name in METRIC_NAMES}
