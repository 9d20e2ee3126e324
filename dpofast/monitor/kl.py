"""How far the policy is from its reference, per scored token of the data."""

from __future__ import annotations

from torch import Tensor

KL, DRIFT = "kl", "kl/absolute"


def kl_sums(
    logps: Tensor,  # [2P]
    ref_logps: Tensor,  # [2P]
    lengths: Tensor,  # [P, 2]
    token_weights: Tensor | None = None,  # [N]
) -> tuple[dict[str, Tensor], Tensor]:
    """Two distances from the reference, as sums over answers and their number of scored tokens.

    `kl` is the mean over tokens of log pi(t) - log ref(t). On texts that are sampled from pi, it
    estimates KL(pi || ref) without bias (k1 of J. Schulman, "Approximating KL divergence", 2020).
    On the fixed texts of a dataset it is no such estimate, and may be negative.

    `kl/absolute` takes the absolute value of each answer's log-ratio first, so that chosen answers
    that rise and rejected ones that fall don't cancel out. It is at least |kl|.

    Args:
        logps: [2P] summed log-probs of the policy, in nats, one per answer of a pair.
        ref_logps: [2P] summed log-probs of the reference.
        lengths: [P, 2] int64, scored tokens of the answers, on any device.
        token_weights: [N] factors of the tokens in the summed log-probs; None for 1.

    Returns:
        The sums by name, [] fp64 in nats, and the tokens, [] each counted by its factor. Neither
        has a gradient.
    """
    logratios = logps.detach().double() - ref_logps.detach().double()  # [2P]
    sums = {KL: logratios.sum(), DRIFT: logratios.abs().sum()}
    tokens = lengths.sum() if token_weights is None else token_weights.sum()
    return sums, tokens
