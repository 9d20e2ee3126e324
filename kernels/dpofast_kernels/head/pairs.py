"""The pairs of a call: which rows they have, and how their losses follow from the log-probs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dpofast_kernels.head.sequences import segment_sums
from dpofast_kernels.head.units import Chunk, PairIndices, cut_units
from dpofast_kernels.preference import METRIC_NAMES, PairLoss, PairWeighting
from dpofast_kernels.preference.metrics import metrics_of_pairs


@dataclass(frozen=True, eq=False)
class PairTerms:
    """The loss of each pair, its derivatives and its metrics, as a back end computes them.

    Attributes:
        losses: [P] fp64.
        logps: [S] fp64, summed log-probs of the policy.
        slopes: [P, 2] fp64, derivatives of each pair's loss with respect to the summed log-probs of
            its chosen and of its rejected sequence.
        metrics: [8, P] fp64, in the order of `METRIC_NAMES`.
    """

    losses: Tensor
    logps: Tensor
    slopes: Tensor
    metrics: Tensor


@dataclass(frozen=True, eq=False)
class SequenceTerms:
    """The losses of a chunk, and what they ask of its sequences.

    Attributes:
        losses: [P] fp64, weighted.
        logps: [S] fp64, summed log-probs of the policy.
        d_logps: [S] fp64, derivative of the whole loss with respect to `logps`.
        metrics: [8, P] fp64, in the order of `METRIC_NAMES`.
        statistics: [K, S] fp64, summed statistics of the rows; None if they have none.
        pair_weights: [P] fp64, WPO's weights; None without weighting.
    """

    losses: Tensor
    logps: Tensor
    d_logps: Tensor
    metrics: Tensor
    statistics: Tensor | None
    pair_weights: Tensor | None


class PairOps(Protocol):
    """The part of a back end that computes the losses of pairs."""

    def pair_loss(
        self,
        per_token_logps: Tensor,  # [n]
        pairs: Pairs,
    ) -> PairTerms:
        """Sums per sequence in fp64, each pair's loss without its weight, and its metrics."""


@dataclass(frozen=True, eq=False)
class Incidence:
    """The sequences of each pair, and the pairs of each sequence.

    Slot 2p is the chosen sequence of pair p, slot 2p + 1 the rejected one.

    Attributes:
        pairs: [P, 2] int64, sequences of each pair.
        slots: [2P] int64, the slots of the first sequence, then those of the second, ...
        bounds: [S+1] int64, bounds of each sequence in `slots`.
        pair_list, limits: `pairs` and `bounds` on the host.
    """

    pairs: Tensor
    slots: Tensor
    bounds: Tensor
    pair_list: list[tuple[int, int]]
    limits: list[int]

    @classmethod
    def on(cls, device: torch.device, pairs: Tensor, num_sequences: int) -> Incidence:
        """The incidence of pairs [P, 2], which are on the host."""
        flat = pairs.flatten()
        slots = torch.argsort(flat, stable=True)  # [2P]
        counts = torch.bincount(flat, minlength=num_sequences)  # [S]
        bounds = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(
            pairs.to(device, non_blocking=True),
            slots.to(device, non_blocking=True),
            bounds.to(device, non_blocking=True),
            [(chosen, rejected) for chosen, rejected in pairs.tolist()],
            bounds.tolist(),
        )

    def part(self, chunk: Chunk) -> Incidence:
        """The same for the sequences and pairs of a chunk, counted from its first ones."""
        pairs = slice(chunk.first_pair, chunk.last_pair)
        first_slot = self.limits[chunk.first]
        sequences = slice(chunk.first, chunk.last + 1)
        return Incidence(
            self.pairs[pairs] - chunk.first,
            self.slots[first_slot : self.limits[chunk.last]] - 2 * chunk.first_pair,
            self.bounds[sequences] - first_slot,
            [(a - chunk.first, b - chunk.first) for a, b in self.pair_list[pairs]],
            [limit - first_slot for limit in self.limits[sequences]],
        )

    def to_sequences(
        self,
        slopes: Tensor,  # [P, 2]
    ) -> Tensor:
        """[S]: the sum over each sequence's slots; 0 for a sequence without pairs."""
        # In the same order every time, unlike index_add_ on a GPU.
        return segment_sums(slopes.flatten()[self.slots], self.bounds)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Which rows belong to which sequence, the pairs of sequences, and their loss.

    All tensors are on the device of the hidden states.

    Attributes:
        bounds: [S+1] int64.
        limits: the same numbers on the host.
        ref_logps: [S] fp64.
        loss: loss of each pair.
        incidence: sequences of each pair; None for (0, 1), (2, 3), ...
        weights: [P] fp64, factor of each pair's loss; None for 1.
        smoothing: [P] fp64, label smoothing of each pair; None for that of the loss.
        coefficients: [S] fp64, what one nat of each sequence's log-prob adds to the loss; None for
            0.
        token_weights: [N] fp64, factor of each row in its sequence's log-prob; None for 1.
        weighting: WPO's weight of each pair, which needs the rows' log_sum_p2; None for 1.
        statistics: names of the rows' statistics.
    """

    bounds: Tensor
    limits: list[int]
    ref_logps: Tensor
    loss: PairLoss
    incidence: Incidence | None = None
    weights: Tensor | None = None
    smoothing: Tensor | None = None
    coefficients: Tensor | None = None
    token_weights: Tensor | None = None
    weighting: PairWeighting | None = None
    statistics: tuple[str, ...] = ()

    @property
    def num_metrics(self) -> int:
        return len(METRIC_NAMES)

    @property
    def pair_list(self) -> PairIndices:
        """Chosen and rejected sequence of each pair, on the host."""
        if self.incidence is not None:
            return self.incidence.pair_list
        return [(first, first + 1) for first in range(0, len(self.limits) - 1, 2)]

    def units(self) -> list[Chunk]:
        return cut_units(self.limits, None if self.incidence is None else self.pair_list)

    def part(self, chunk: Chunk) -> Pairs:
        """The sequences and pairs of a chunk, whose rows are counted from its first one."""
        sequences, pairs = slice(chunk.first, chunk.last), slice(chunk.first_pair, chunk.last_pair)
        bounds = slice(chunk.first, chunk.last + 1)
        return Pairs(
            self.bounds[bounds] - chunk.start,
            [limit - chunk.start for limit in self.limits[bounds]],
            self.ref_logps[sequences],
            self.loss,
            None if self.incidence is None else self.incidence.part(chunk),
            _sliced(self.weights, pairs),
            _sliced(self.smoothing, pairs),
            _sliced(self.coefficients, sequences),
            _sliced(self.token_weights, slice(chunk.start, chunk.end)),
            self.weighting,
            self.statistics,
        )

    def terms(
        self,
        ops: PairOps,
        per_token_logps: Tensor,  # [N]
        statistics: Tensor | None,  # [K, N]
    ) -> SequenceTerms:
        """The weighted losses, and the derivative of the whole loss by each sequence's log-prob."""
        pair_weights = self.pair_weights(per_token_logps, statistics)
        if self.token_weights is not None:
            per_token_logps = per_token_logps * self.token_weights
        if self.pair_list:
            terms = ops.pair_loss(per_token_logps, self)
        else:
            logps, empty = segment_sums(per_token_logps, self.bounds), self.ref_logps.new_zeros(0)
            terms = PairTerms(empty, logps, empty.view(0, 2), empty.new_zeros(len(METRIC_NAMES), 0))
        losses, slopes = terms.losses, terms.slopes
        for weights in (self.weights, pair_weights):
            if weights is not None:
                losses, slopes = losses * weights, slopes * weights[:, None]
        d_logps = (
            slopes.flatten() if self.incidence is None else self.incidence.to_sequences(slopes)
        )
        if self.coefficients is not None:
            d_logps = d_logps + self.coefficients
        summed = self.summed_statistics(statistics)
        return SequenceTerms(losses, terms.logps, d_logps, terms.metrics, summed, pair_weights)

    def pair_weights(
        self,
        per_token_logps: Tensor,  # [N]
        statistics: Tensor | None,  # [K, N]
    ) -> Tensor | None:
        """[P]: WPO's weights, without gradient; None without weighting."""
        if self.weighting is None:
            return None
        assert statistics is not None
        log_sum_p2 = statistics[self.statistics.index("log_sum_p2")]  # [N]
        # The token weights are left out: they belong to the loss, not to the answer's probability.
        aligned = per_token_logps.detach().double() - log_sum_p2.double()
        sums = segment_sums(aligned, self.bounds)  # [S]
        return self.weighting.weights(self.of_pairs(sums), self.of_pairs(self.bounds.diff()))

    def summed_statistics(
        self,
        statistics: Tensor | None,  # [K, N]
    ) -> Tensor | None:
        """[K, S] fp64: sums over each sequence's rows; None if the rows have no statistics."""
        if statistics is None:
            return None
        return torch.stack([segment_sums(each, self.bounds) for each in statistics])

    def of_pairs(
        self,
        per_sequence: Tensor,  # [S]
    ) -> Tensor:
        """[P, 2]: the numbers of each pair's chosen and rejected sequence."""
        if self.incidence is None:
            return per_sequence.view(-1, 2)
        return per_sequence[self.incidence.pairs]

    def pair_losses(
        self,
        logps: Tensor,  # [S]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of each pair and its two derivatives, [P] each, in PyTorch and without weights."""
        chosen, rejected = self.of_pairs(logps - self.ref_logps).unbind(1)  # [P]
        lengths = self.of_pairs(self.bounds.diff())  # [P, 2]
        if self.smoothing is None:
            return self.loss.pair_loss(chosen, rejected, lengths)
        return self.loss.smoothed_loss(chosen, rejected, lengths, self.smoothing)

    def metrics(
        self,
        logps: Tensor,  # [S]
    ) -> Tensor:
        """[8, P] fp64, in the order of `METRIC_NAMES`."""
        lengths = self.of_pairs(self.bounds.diff())
        found = metrics_of_pairs(
            *(self.of_pairs(logps), self.of_pairs(self.ref_logps), lengths),
            *(self.loss.beta, self.loss.has_rewards_per_token),
        )
        return torch.stack([*found.values()])

    def to_rows(
        self,
        per_sequence: Tensor,  # [S]
    ) -> Tensor:
        """[N]: each sequence's number, repeated for its rows, times the rows' own weights."""
        # Without output_size PyTorch would wait for the device to learn it.
        rows = per_sequence.repeat_interleave(self.bounds.diff(), output_size=self.limits[-1])
        return rows if self.token_weights is None else rows * self.token_weights


def _sliced(tensor: Tensor | None, part: slice) -> Tensor | None:
    return None if tensor is None else tensor[part]
