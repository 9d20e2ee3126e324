"""What a backend does with a chunk of rows: from hidden states to log-probs and their gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dpofast_kernels.preference import PairLoss


@dataclass(frozen=True, eq=False)
class ScoredRows:
    """A chunk's log-probs, and what the backend keeps for their gradient.

    Attributes:
        per_token_logps: [n], in nats.
        kept: as the backend's own `differentiate` wants it; empty where no gradient is to follow.
            May lie in the workspace.
        logsumexps: [n], of the finished logits, or None where a gradient is to follow.
    """

    per_token_logps: Tensor
    kept: tuple[Tensor, ...] = ()
    logsumexps: Tensor | None = None


@dataclass(frozen=True, eq=False)
class LogitGradients:
    """The gradient by row r of hidden_states @ weight^T is factors[r] * d_logits[r].

    Attributes:
        d_logits: [n, V], in the dtype that goes into products.
        factors: [n], or None where all of them are 1. Apart from d_logits, small ones aren't lost
            in a dtype of narrow range; but hidden states times factors are rounded once more.
    """

    d_logits: Tensor
    factors: Tensor | None


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
        workspace: Tensor | None,  # [m, V], m >= n: a product may fill a few rows more
        keep: bool,
    ) -> ScoredRows:
        """Log-probs of the labels; with `keep` what `differentiate` needs, else log-sum-exps."""

    def differentiate(
        self,
        scored: ScoredRows,
        labels: Tensor,  # [n]
        coefficients: Tensor,  # [n]
    ) -> LogitGradients:
        """Of sum(coefficients * per_token_logps), in place of what `scored` kept: once alone."""

    def pair_loss(
        self,
        per_token_logps: Tensor,  # [n]
        bounds: Tensor,  # [2P+1]
        ref_logps: Tensor,  # [2P]
        loss: PairLoss,
    ) -> PairTerms:
        """Sums per sequence in fp64, each pair's loss, and its metrics."""
