"""What a backend does with the logits of a chunk of rows, between the products around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dpofast_kernels.preference import PairLoss


@dataclass(frozen=True, eq=False)
class ScoredRows:
    """A chunk's log-probs, and what its gradient needs.

    Attributes:
        per_token_logps: [n], in nats.
        logits: [n, V]; what has become of them is the backend's own affair.
        labels: [n].
        row_max: [n], of the finished logits.
        sums: [n] of exp(logits - row_max).
    """

    per_token_logps: Tensor
    logits: Tensor
    labels: Tensor
    row_max: Tensor
    sums: Tensor


@dataclass(frozen=True, eq=False)
class PairTerms:
    """The loss of each pair and its derivatives.

    Attributes:
        losses: [P] fp64.
        logps: [2P] fp64, summed.
        d_logps: [2P] fp64, derivative of its pair's loss by each.
    """

    losses: Tensor
    logps: Tensor
    d_logps: Tensor


class RowOps(Protocol):
    """The row operations of one backend, for one head."""

    def score(
        self,
        logits: Tensor,  # [n, V]
        labels: Tensor,  # [n]
    ) -> ScoredRows:
        """Log-probs of the labels from hidden_states @ weight^T, which it may overwrite."""

    def d_logits(
        self,
        scored: ScoredRows,
        coefficients: Tensor,  # [n]
    ) -> tuple[Tensor, Tensor]:
        """d_logits [n, V] and factors [n], in place of the logits where dtypes allow.

        The gradient of sum(coefficients * per_token_logps) by hidden_states @ weight^T is
        factors[:, None] * d_logits. They stay apart, so that a small coefficient isn't rounded into
        a low-precision matrix: the factors go to the other side of each product.
        """

    def pair_loss(
        self,
        per_token_logps: Tensor,  # [n]
        bounds: Tensor,  # [2P+1]
        ref_logps: Tensor,  # [2P]
        loss: PairLoss,
    ) -> PairTerms:
        """Sums per sequence in fp64, and each pair's loss."""
