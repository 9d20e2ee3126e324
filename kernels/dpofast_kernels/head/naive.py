"""The head's ops written plainly: all logits at once, and gradients by autograd.

Tests compare the other back ends with these functions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dpofast_kernels.head.options import HeadOptions, PairLossOutput
from dpofast_kernels.head.pairs import Pairs
from dpofast_kernels.head.sequences import segment_sums
from dpofast_kernels.head.singles import Singles


def naive_logits(
    hidden_states: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    options: HeadOptions,
) -> Tensor:
    """[N, V] logits, fp32 (fp64 for fp64 inputs), as the model itself would compute them.

    With bf16 or fp16 inputs, the product is rounded to that dtype first. The other back ends don't
    round it.
    """
    logits = F.linear(hidden_states, weight, options.bias)
    if logits.dtype != torch.float64:
        logits = logits.float()
    logits = logits * options.logit_scale
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    return logits / options.temperature


def naive_linear_logps(
    hidden_states: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [N]
    options: HeadOptions,
) -> Tensor:
    """[N] per-token log-probs; see `linear_logps`."""
    vocab_logps = naive_logits(hidden_states, weight, options).log_softmax(-1)  # [N, V]
    return vocab_logps.gather(-1, labels[:, None])[:, 0]


def naive_linear_scores(
    hidden_states: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [N]
    options: HeadOptions,
) -> Tensor:
    """[2, N] per-token log-probs and log-sum-exps; see `linear_scores`."""
    logsumexps = naive_logits(hidden_states, weight, options).logsumexp(-1)  # [N]
    return torch.stack([naive_linear_logps(hidden_states, weight, labels, options), logsumexps])


def naive_linear_statistics(
    hidden_states: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [N]
    options: HeadOptions,
    statistics: tuple[str, ...],
) -> Tensor:
    """[K, N] statistics of each row's softmax; see `linear_statistics`."""
    logits = naive_logits(hidden_states, weight, options)  # [N, V]
    probs, vocab_logps = logits.softmax(-1), logits.log_softmax(-1)
    target_logits = logits.gather(-1, labels[:, None])[:, 0]
    found = {
        # A token that a bias of -inf rules out counts 0, where 0 * -inf would be NaN.
        "entropy": -torch.where(probs != 0.0, probs * vocab_logps, 0.0).sum(-1),
        "mean_logit": logits.mean(-1),
        "is_top": (target_logits == logits.amax(-1)).to(logits.dtype),
        "log_sum_p2": (2.0 * vocab_logps).logsumexp(-1),
    }
    return torch.stack([found[name] for name in statistics])


def naive_pair_loss(
    per_token_logps: Tensor,  # [N]
    pairs: Pairs,
    statistics: Tensor | None,  # [K, N]
) -> PairLossOutput:
    """The loss of given per-token log-probs, summed over pairs; see `linear_pair_loss`."""
    pair_weights = pairs.pair_weights(per_token_logps, statistics)
    if pairs.token_weights is not None:
        per_token_logps = per_token_logps * pairs.token_weights
    logps = segment_sums(per_token_logps, pairs.bounds)  # [S]
    losses, _, _ = pairs.pair_losses(logps)  # [P]
    for weights in (pairs.weights, pair_weights):
        if weights is not None:
            losses = losses * weights
    loss = losses.sum()
    if pairs.coefficients is not None:
        loss = loss + (logps * pairs.coefficients).sum()
    return PairLossOutput(
        *(loss, logps.detach(), pairs.metrics(logps.detach())),
        *(pairs.summed_statistics(statistics), pair_weights),
    )


def naive_sequence_loss(
    per_token_logps: Tensor,  # [N]
    singles: Singles,
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss [], logps [S] and metrics [2, S]; see `linear_sequence_loss`."""
    logps = segment_sums(per_token_logps, singles.bounds)  # [S]
    losses, _ = singles.losses(logps)
    return losses.sum(), logps.detach(), singles.metrics(logps.detach())
