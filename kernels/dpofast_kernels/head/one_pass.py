"""The loss of pairs and its gradients in one pass over the logits.

With the reference's log-probs at hand, a pair's own logits are all that its loss needs. So chunks
are whole pairs, and the derivative of each pair's loss is known while its logits still stand:
6NHV operations forward and backward, where schemes that make the logits twice need 8NHV.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpofast_kernels.head.chunked import ChunkedHead, Gradients, Wanted
from dpofast_kernels.head.chunks import PairChunk, pair_chunks
from dpofast_kernels.head.rows import PairTerms
from dpofast_kernels.preference import METRIC_NAMES, PairLoss


@dataclass(frozen=True, eq=False)
class Pairs:
    """Which rows belong to which pair, and how a pair is judged.

    Attributes:
        bounds: [2P+1] int64, on the device of the hidden states.
        limits: the same numbers on the host.
        ref_logps: [2P] fp64, on the same device.
        loss: of each pair.
    """

    bounds: Tensor
    limits: list[int]
    ref_logps: Tensor
    loss: PairLoss

    def chunk_bounds(self, chunk: PairChunk) -> Tensor:
        """[2p+1], from 0."""
        return self.bounds[2 * chunk.first : 2 * chunk.last + 1] - chunk.start

    def chunk_ref_logps(self, chunk: PairChunk) -> Tensor:
        return self.ref_logps[2 * chunk.first : 2 * chunk.last]  # [2p]


def one_pass(
    head: ChunkedHead, pairs: Pairs, wanted: Wanted
) -> tuple[Tensor, Tensor, Tensor, Gradients | None]:
    """Summed loss [] fp64, summed logps [2P] fp64, metrics [8, P] fp64; gradients of that loss."""
    gradients = head.new_gradients(wanted) if wanted else None
    chunks = list(pair_chunks(pairs.limits, head.max_rows))
    # The first long pair is summed up where all will be, while that is empty: so it goes first.
    terms_of = {
        chunk.first: _whole_chunk(head, pairs, chunk, gradients)
        if chunk.num_rows <= head.max_rows
        else _long_pair(head, pairs, chunk, gradients)
        for chunk in sorted(chunks, key=lambda chunk: chunk.num_rows <= head.max_rows)
    }
    terms = [terms_of[chunk.first] for chunk in chunks]
    if gradients is not None:
        gradients.fill_empty()
    if not terms:
        empty = pairs.ref_logps.new_zeros(len(METRIC_NAMES), 0)
        return empty.sum(), empty[0], empty, gradients
    losses = torch.cat([term.losses for term in terms])
    logps = torch.cat([term.logps for term in terms])
    return losses.sum(), logps, torch.cat([term.metrics for term in terms], 1), gradients


def _whole_chunk(
    head: ChunkedHead, pairs: Pairs, chunk: PairChunk, gradients: Gradients | None
) -> PairTerms:
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
    """A pair that doesn't fit a chunk: its gradient is made before its loss is known.

    Where the loss' two derivatives keep one ratio, that direction takes their place and their
    length is multiplied in afterwards. Else the logits are made a second time.
    """
    # on the host: what is made there and sent to a device would be waited for
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
    """One pass over a long pair whose derivatives are a multiple of `direction`."""
    own = head.gradients_of_one_pair(gradients)
    middle = pairs.limits[2 * chunk.first + 1] - chunk.start
    coefficients = pairs.ref_logps.new_full((chunk.num_rows,), direction[0])  # [n]
    coefficients[middle:] = direction[1]
    per_token_logps = []
    for rows in head.row_chunks(chunk.start, chunk.end):
        scored = head.score(rows)
        per_token_logps.append(scored.per_token_logps)
        part = coefficients[rows.start - chunk.start : rows.stop - chunk.start]
        head.add_gradients(own, rows, scored, part)
    terms = _pair_terms(head, pairs, chunk, torch.cat(per_token_logps))
    longer = int(abs(direction[1]) > abs(direction[0]))  # either may be 0
    length = (terms.d_logps[longer] / direction[longer]).to(head.dtype)  # []
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
    """[n]: each sequence's number at each of its rows."""
    # without the size a device would be waited for
    return per_sequence.repeat_interleave(bounds.diff(), output_size=num_rows)
