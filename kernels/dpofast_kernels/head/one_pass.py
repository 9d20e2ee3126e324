"""The loss of pairs and its gradients, in one pass over the logits.

With the reference's log-probs known beforehand, the loss of a pair depends on that pair's logits
only. So chunks are cut between pairs, and the derivative of each pair's loss is known while its
logits are still in memory. Forward and backward take 6NHV operations; schemes that compute the
logits twice take 8NHV.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpofast_kernels.head.chunked import ChunkedHead, Gradients, Wanted
from dpofast_kernels.head.rows import PairTerms
from dpofast_kernels.head.workspace import PairChunk, pair_chunks
from dpofast_kernels.preference import METRIC_NAMES, PairLoss


@dataclass(frozen=True, eq=False)
class Pairs:
    """Which rows belong to which pair, and the loss of a pair.

    Attributes:
        bounds: [2P+1] int64, on the device of the hidden states.
        limits: the same numbers on the host.
        ref_logps: [2P] fp64, on the device of the hidden states.
        loss: loss of each pair.
    """

    bounds: Tensor
    limits: list[int]
    ref_logps: Tensor
    loss: PairLoss

    @classmethod
    def on(
        cls,
        device: torch.device,
        bounds: Tensor,  # [2P+1]
        limits: list[int],
        ref_logps: Tensor,  # [2P]
        loss: PairLoss,
    ) -> Pairs:
        """Pairs whose tensors are moved to a device, without waiting for the copies."""
        ref_logps = ref_logps.detach().to(device, torch.float64, non_blocking=True)
        return cls(bounds.to(device, non_blocking=True), limits, ref_logps, loss)

    def chunk_bounds(self, chunk: PairChunk) -> Tensor:
        """[2p+1], bounds of the chunk's sequences, counted from the chunk's first row."""
        return self.bounds[2 * chunk.first : 2 * chunk.last + 1] - chunk.start

    def chunk_ref_logps(self, chunk: PairChunk) -> Tensor:
        return self.ref_logps[2 * chunk.first : 2 * chunk.last]  # [2p]


def one_pass(
    head: ChunkedHead, pairs: Pairs, wanted: Wanted
) -> tuple[Tensor, Tensor, Tensor, Gradients | None]:
    """The loss, summed over all pairs, and its gradients.

    Returns:
        Summed loss [] fp64, summed logps [2P] fp64, metrics [8, P] fp64, and the gradients, or None
        if no gradient is wanted.
    """
    gradients = head.new_gradients(wanted) if wanted else None
    chunks = list(pair_chunks(pairs.limits, head.max_rows))
    terms_of: dict[PairChunk, PairTerms] = {}
    # Pairs too long for a chunk go first. The first of them finds `gradients` empty and can be
    # summed in place; every other one needs a second buffer of the weight's size.
    for chunk in chunks:
        if chunk.num_rows > head.max_rows:
            terms_of[chunk] = _long_pair(head, pairs, chunk, gradients)
    for chunk in chunks:
        if chunk.num_rows <= head.max_rows:
            terms_of[chunk] = _whole_chunk(head, pairs, chunk, gradients)
    if gradients is not None:
        gradients.fill_empty()
    if not chunks:
        empty = pairs.ref_logps.new_zeros(len(METRIC_NAMES), 0)
        return empty.sum(), empty[0], empty, gradients
    terms = [terms_of[chunk] for chunk in chunks]  # back in the pairs' order
    losses = torch.cat([term.losses for term in terms])
    logps = torch.cat([term.logps for term in terms])
    return losses.sum(), logps, torch.cat([term.metrics for term in terms], 1), gradients


def _whole_chunk(
    head: ChunkedHead, pairs: Pairs, chunk: PairChunk, gradients: Gradients | None
) -> PairTerms:
    """Pairs that fit into one chunk, the usual case: score, loss, gradients."""
    rows = slice(chunk.start, chunk.end)
    scored = head.score(rows)
    terms = _pair_terms(head, pairs, chunk, scored.per_token_logps)
    if gradients is not None:
        coefficients = _to_rows(terms.d_logps, pairs.chunk_bounds(chunk), chunk.num_rows)
        head.add_gradients(gradients, rows, scored, coefficients)
    return terms


def _long_pair(
    head: ChunkedHead, pairs: Pairs, chunk: PairChunk, gradients: Gradients | None
) -> PairTerms:
    """A pair that doesn't fit into one chunk: its loss is known only after its last chunk.

    If the loss's two derivatives have a fixed direction (see `PairLoss.direction`), the gradient is
    summed along it, and multiplied at the end by the factor that makes it the true gradient.
    Otherwise the logits are computed a second time.
    """
    # This tensor stays on the host, where its numbers are: copying it to the device, or the
    # direction back, would make the host wait.
    limits = torch.tensor(pairs.limits[2 * chunk.first : 2 * chunk.last + 1])
    direction = pairs.loss.direction(limits.diff().view(1, 2))  # [1, 2]
    if gradients is not None and direction is not None:
        return _long_pair_along(head, pairs, chunk, gradients, direction.flatten().tolist())
    subchunks = head.row_chunks(chunk.start, chunk.end)
    per_token_logps = torch.cat(
        [head.score(rows, keep=False).per_token_logps for rows in subchunks]
    )
    terms = _pair_terms(head, pairs, chunk, per_token_logps)
    if gradients is not None:
        coefficients = _to_rows(terms.d_logps, pairs.chunk_bounds(chunk), chunk.num_rows)
        for rows in subchunks:
            part = coefficients[rows.start - chunk.start : rows.stop - chunk.start]
            head.add_gradients(gradients, rows, head.score(rows), part)
    return terms


def _long_pair_along(
    head: ChunkedHead,
    pairs: Pairs,
    chunk: PairChunk,
    gradients: Gradients,
    direction: list[float],  # [2]
) -> PairTerms:
    """A long pair in one pass: its derivatives are a multiple of `direction`."""
    own = head.gradients_of_one_pair(gradients)
    middle = pairs.limits[2 * chunk.first + 1] - chunk.start  # the first row of the rejected answer
    coefficients = pairs.ref_logps.new_full((chunk.num_rows,), direction[0])  # [n]
    coefficients[middle:] = direction[1]
    per_token_logps = []
    for rows in head.row_chunks(chunk.start, chunk.end):
        scored = head.score(rows)
        per_token_logps.append(scored.per_token_logps)
        part = coefficients[rows.start - chunk.start : rows.stop - chunk.start]
        head.add_gradients(own, rows, scored, part)
    terms = _pair_terms(head, pairs, chunk, torch.cat(per_token_logps))
    # d_logps is this factor times `direction`. Divide by the larger component of `direction`,
    # because the smaller one can be 0.
    larger = int(abs(direction[1]) > abs(direction[0]))
    length = (terms.d_logps[larger] / direction[larger]).to(head.dtype)  # []
    gradients.add_pair(own, slice(chunk.start, chunk.end), length)
    return terms


def _pair_terms(
    head: ChunkedHead, pairs: Pairs, chunk: PairChunk, per_token_logps: Tensor
) -> PairTerms:
    return head.pair_loss(
        per_token_logps, pairs.chunk_bounds(chunk), pairs.chunk_ref_logps(chunk), pairs.loss
    )


def _to_rows(
    per_sequence: Tensor,  # [2p]
    bounds: Tensor,  # [2p+1]
    num_rows: int,
) -> Tensor:
    """[n]: each sequence's number, repeated for each of its rows."""
    # Without output_size PyTorch would wait for the device to learn it.
    return per_sequence.repeat_interleave(bounds.diff(), output_size=num_rows)
