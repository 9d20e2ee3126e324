"""What a backend does with a chunk of rows: from hidden states to log-probs, and their gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dpofast_kernels.preference import PairLoss


@dataclass(frozen=True, eq=False)
class ScoredRows:
    """A chunk's log-probs, and what its gradient needs.

    The gradient of per_token_logps[r] by row r of hidden_states @ weight^T is
    factors[r] * d_logits[r]. They stay apart, and so do a pair's coefficients: a small number
    would be lost in a low-precision matrix, so it goes to the other side of each product.

    Attributes:
        per_token_logps: [n], in nats.
        d_logits: [n, V], or None where no gradient is to follow.
        factors: [n], likewise.
        logsumexps: [n], of the finished logits, or None where a gradient is to follow.
    """

    per_token_logps: Tensor
    d_logits: Tensor | None
    factors: Tensor | None
    logsumexps: Tensor | None = None


@dataclass(frozen=True, eq=False)
class PairTerms:
    """The loss of each pair, its derivatives, and what is logged of it.

    Attributes:
        losses: [P] fp64.
        logps: [2P] fp64, summed.
        d_logps: [2P] fp64, derivative of its pair's loss by each.
        metrics: [8, P] fp64, in the order of `METRIC_NAMES`.
    """

    losses: Tensor
    logps: Tensor
    d_logps: Tensor
    metrics: Tensor


class RowOps(Protocol):
    """The row operations of one backend, for one weight [V, H] and its options."""

    def workspace_dtype(self, keep: bool) -> torch.dtype | None:
        """Of the [n, V] workspace that `score` needs; None where it needs none."""

    def score(
        self,
        hidden_states: Tensor,  # [n, H]
        labels: Tensor,  # [n]
        workspace: Tensor | None,  # [n, V]
        keep: bool,
    ) -> ScoredRows:
        """Log-probs of the labels; with `keep` their gradient by the product, else log-sum-exps.

        `d_logits` may lie in the workspace.
        """

    def pair_loss(
        self,
        per_token_logps: Tensor,  # [n]
        bounds: Tensor,  # [2P+1]
        ref_logps: Tensor,  # [2P]
        loss: PairLoss,
    ) -> PairTerms:
        """Sums per sequence in fp64, each pair's loss, and its metrics."""
