"""The interface of a back end: scores of a chunk of rows, their gradient, and the losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dpofast_kernels.head.pairs import PairOps
from dpofast_kernels.head.singles import SingleOps


@dataclass(frozen=True, eq=False)
class ScoredRows:
    """A chunk's log-probs, and what the back end needs for their gradient.

    Attributes:
        per_token_logps: [n], in nats.
        kept: tensors for the back end's own `differentiate`, some of them in the workspace; empty
            if no gradient follows.
        logsumexps: [n], log-sum-exp of the finished logits; None if a gradient follows.
        statistics: [K, n], the statistics that were asked for, in that order; None if none was.
    """

    per_token_logps: Tensor
    kept: tuple[Tensor, ...] = ()
    logsumexps: Tensor | None = None
    statistics: Tensor | None = None


@dataclass(frozen=True, eq=False)
class LogitGradients:
    """Gradient with respect to the products x W^T: row r is factors[r] * d_logits[r].

    Attributes:
        d_logits: [n, V], in the dtype that enters matrix products.
        factors: [n], or None if all are 1. A back end keeps them apart if it writes d_logits before
            it knows the coefficients, or to save a pass over d_logits. The price, in a dtype below
            fp32, is one more rounding: that of the hidden states times the factors.
    """

    d_logits: Tensor
    factors: Tensor | None


class RowOps(PairOps, SingleOps, Protocol):
    """The row operations of a back end, for one weight [V, H], its options, and statistics."""

    @property
    def vocab_major(self) -> bool:
        """Whether `score` wants a workspace whose columns are contiguous; see `Workspace`."""

    def workspace_dtype(self, keep: bool) -> torch.dtype | None:
        """Dtype of the [n, V] workspace that `score` needs, or None if it needs none."""

    def score(
        self,
        hidden_states: Tensor,  # [n, H]
        labels: Tensor,  # [n]
        workspace: Tensor | None,  # [m, V], m >= n: some products fill a few rows more
        keep: bool,
    ) -> ScoredRows:
        """Log-probs of the labels.

        With `keep`, the result contains what `differentiate` needs. Without `keep`, it contains the
        log-sum-exps. With and without, it contains the statistics.
        """

    def differentiate(
        self,
        scored: ScoredRows,
        labels: Tensor,  # [n]
        coefficients: Tensor,  # [n]
    ) -> LogitGradients:
        """Gradient of sum(coefficients * per_token_logps).

        The gradient may overwrite the tensors in `scored.kept`, so call this once per `scored`.
        """
