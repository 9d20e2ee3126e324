"""The single answers of a call: which rows they have, and how log-probs give their losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from dpofast_kernels.head.options import SEQUENCE_METRIC_NAMES
from dpofast_kernels.head.pairs import SequenceTerms
from dpofast_kernels.head.sequences import segment_sums
from dpofast_kernels.head.units import Chunk
from dpofast_kernels.preference import UnpairedLoss


class SingleOps(Protocol):
    """The part of a back end that computes the losses of single answers."""

    def sequence_loss(
        self,
        per_token_logps: Tensor,  # [n]
        singles: Singles,
    ) -> SequenceTerms:
        """Sums per sequence in fp64, each one's weighted loss, its derivative and its metrics."""


@dataclass(frozen=True, eq=False)
class Singles:
    """Which rows belong to which sequence, and the loss of each sequence by itself.

    All tensors are on the device of the hidden states.

    Attributes:
        bounds: [S+1] int64.
        limits: the same numbers on the host.
        ref_logps: [S] fp64.
        is_desirable: [S] bool.
        loss: loss of each sequence.
        z: [] fp64, what the loss compares log-ratios with.
        weights: [S] fp64, factor of each sequence's loss; None for 1.
    """

    bounds: Tensor
    limits: list[int]
    ref_logps: Tensor
    is_desirable: Tensor
    loss: UnpairedLoss
    z: Tensor
    weights: Tensor | None = None

    # No log-prob adds to the loss directly, and there are neither statistics nor WPO's weights.
    coefficients: ClassVar[None] = None
    statistics: ClassVar[tuple[str, ...]] = ()
    weighting: ClassVar[None] = None
    num_metrics: ClassVar[int] = len(SEQUENCE_METRIC_NAMES)

    def units(self) -> list[Chunk]:
        """A unit for each sequence, without pairs."""
        limits = self.limits
        return [
            Chunk(first, first + 1, 0, 0, limits[first], limits[first + 1])
            for first in range(len(limits) - 1)
        ]

    def part(self, chunk: Chunk) -> Singles:
        """The sequences of a chunk, whose rows are counted from its first one."""
        sequences, bounds = slice(chunk.first, chunk.last), slice(chunk.first, chunk.last + 1)
        return Singles(
            self.bounds[bounds] - chunk.start,
            [limit - chunk.start for limit in self.limits[bounds]],
            self.ref_logps[sequences],
            self.is_desirable[sequences],
            self.loss,
            self.z,
            None if self.weights is None else self.weights[sequences],
        )

    def terms(
        self,
        ops: SingleOps,
        per_token_logps: Tensor,  # [N]
        statistics: Tensor | None = None,
    ) -> SequenceTerms:
        """The weighted losses, and their sum's derivative with respect to each log-prob."""
        return ops.sequence_loss(per_token_logps, self)

    def terms_in_torch(
        self,
        per_token_logps: Tensor,  # [N]
    ) -> SequenceTerms:
        """The same as `terms`, by PyTorch."""
        logps = segment_sums(per_token_logps, self.bounds)  # [S]
        losses, d_logps = self.losses(logps)
        return SequenceTerms(losses, logps, d_logps, self.metrics(logps), None, None)

    def losses(
        self,
        logps: Tensor,  # [S]
    ) -> tuple[Tensor, Tensor]:
        """Weighted loss of each sequence and its derivative, [S] each."""
        logratios = logps - self.ref_logps
        return self.loss.sequence_loss(logratios, self.is_desirable, self.z, self.weights)

    def metrics(
        self,
        logps: Tensor,  # [S]
    ) -> Tensor:
        """[2, S] fp64, in the order of `SEQUENCE_METRIC_NAMES`."""
        logratios = logps - self.ref_logps
        return torch.stack([self.loss.beta * logratios, logratios / self.bounds.diff()])

    def to_rows(
        self,
        per_sequence: Tensor,  # [S]
    ) -> Tensor:
        """[N]: each sequence's number, repeated for its rows."""
        # Without output_size PyTorch would wait for the device to learn it.
        return per_sequence.repeat_interleave(self.bounds.diff(), output_size=self.limits[-1])
