"""The loss of pairs or of single answers and its gradients, in one pass over the logits.

With the reference's log-probs known beforehand, the loss of a pair depends on that pair's logits
only. So chunks are cut between pairs, and the derivative of each pair's loss is known while its
logits are still in memory. Forward and backward take 6NHV operations; schemes that compute the
logits twice take 8NHV. Pairs that don't fit into a chunk are the business of `long_units`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpofast_kernels.head.chunked import ChunkedHead, Gradients
from dpofast_kernels.head.long_units import long_unit
from dpofast_kernels.head.options import PairLossOutput
from dpofast_kernels.head.pairs import Pairs, SequenceTerms
from dpofast_kernels.head.singles import Singles
from dpofast_kernels.head.units import Chunk, join_units


def one_pass(
    head: ChunkedHead, pairs: Pairs | Singles, upstream: float = 1.0
) -> tuple[PairLossOutput, Gradients | None]:
    """The loss of pairs or single answers, summed, and its gradients; None if none is wanted.

    Args:
        head: the head of the call.
        pairs: its sequences, and their loss.
        upstream: factor of the gradients, but not of the loss.
    """
    gradients = head.new_gradients() if head.wanted else None
    chunks = join_units(pairs.units(), head.limits)
    head.expect([chunk.num_rows for chunk in chunks])
    terms_of: dict[Chunk, SequenceTerms] = {}
    # Units too long for a chunk go first. The first of them finds `gradients` empty and can be
    # summed in place.
    for chunk in chunks:
        if chunk.num_rows > head.limits.most:
            terms_of[chunk] = long_unit(head, pairs.part(chunk), chunk, gradients, upstream)
    for chunk in chunks:
        if chunk.num_rows <= head.limits.most:
            terms_of[chunk] = _whole_chunk(head, pairs.part(chunk), chunk, gradients, upstream)
    if gradients is not None:
        gradients.fill_empty()
    terms = [terms_of[chunk] for chunk in chunks]  # back in the order of the sequences
    return _joined(terms, pairs), gradients


def _joined(terms: list[SequenceTerms], pairs: Pairs | Singles) -> PairLossOutput:
    if not terms:
        empty = pairs.ref_logps.new_zeros(pairs.num_metrics, 0)
        return PairLossOutput(
            *(empty.sum(), empty[0], empty),
            empty.new_zeros(len(pairs.statistics), 0) if pairs.statistics else None,
            None if pairs.weighting is None else empty[0],
        )
    loss = torch.cat([term.losses for term in terms]).sum()
    logps = torch.cat([term.logps for term in terms])
    if pairs.coefficients is not None:
        loss = loss + (pairs.coefficients * logps).sum()
    return PairLossOutput(
        *(loss, logps, torch.cat([term.metrics for term in terms], 1)),
        _cat_if_any([term.statistics for term in terms]),
        _cat_if_any([term.pair_weights for term in terms]),
    )


def _cat_if_any(parts: list[Tensor | None]) -> Tensor | None:
    """The parts joined in their last dimension; either all of them or none are None."""
    given = [part for part in parts if part is not None]
    return torch.cat(given, -1) if given else None


def _whole_chunk(
    head: ChunkedHead,
    part: Pairs | Singles,
    chunk: Chunk,
    gradients: Gradients | None,
    upstream: float,
) -> SequenceTerms:
    """Units that fit into one chunk, the usual case: score, loss, gradients."""
    rows = slice(chunk.start, chunk.end)
    scored = head.score(rows)
    terms = part.terms(head.ops, scored.per_token_logps, scored.statistics)
    if gradients is not None:
        coefficients = part.to_rows(terms.d_logps * upstream)
        head.add_gradients(gradients, rows, scored, coefficients)
    return terms
