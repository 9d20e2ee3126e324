"""Units that don't fit into one chunk: their losses are known only after their last chunk.

The gradient of a pair is d_chosen G_chosen + d_rejected G_rejected, where G is the gradient of a
sequence's log-prob, and the two factors are known last. So each G is summed by itself, in a buffer
of the weight's size, and multiplied at the end. Fewer buffers do if the loss allows it: see
`_summed_parts`. A unit of more than two sequences is scored first, and its logits are computed a
second time, together with their statistics.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dpofast_kernels.head.chunked import ChunkedHead, Gradients
from dpofast_kernels.head.pairs import Pairs, SequenceTerms
from dpofast_kernels.head.rows import ScoredRows, joined_rows
from dpofast_kernels.head.singles import Singles
from dpofast_kernels.head.units import Chunk


def long_unit(
    head: ChunkedHead, part: Pairs | Singles, chunk: Chunk, gradients: Gradients | None
) -> SequenceTerms:
    """Score a unit piece by piece, and add its gradients.

    Args:
        head: the head of the call.
        part: the unit's sequences and pairs, or a single answer.
        chunk: the unit.
        gradients: gradients to add to; None if none are wanted.
    """
    if gradients is None:
        return _terms(head, part, _scored(head, chunk))
    if isinstance(part, Singles):
        return _one_answer(head, part, chunk, gradients)
    if part.loss.is_zero or not chunk.num_pairs:
        return _known_beforehand(head, part, chunk, gradients)
    if chunk.num_sequences != 2 or chunk.num_pairs != 1:
        return _in_two_passes(head, part, chunk, gradients)
    return _one_pair(head, part, chunk, gradients)


def _terms(head: ChunkedHead, part: Pairs | Singles, scored: ScoredRows) -> SequenceTerms:
    return part.terms(head.ops, scored.per_token_logps, scored.statistics)


def _scored(head: ChunkedHead, chunk: Chunk) -> ScoredRows:
    """Log-probs and statistics of the unit's rows."""
    subchunks = head.row_chunks(chunk.start, chunk.end)
    return joined_rows([head.score(rows, keep=False) for rows in subchunks])


def _one_answer(
    head: ChunkedHead, part: Singles, chunk: Chunk, gradients: Gradients
) -> SequenceTerms:
    """A long answer by itself: the gradient of its log-prob is summed first and multiplied last."""
    own, rows = head.own_gradients(gradients, 0), slice(chunk.start, chunk.end)
    terms = _terms(head, part, _add(head, own, rows, part.ref_logps.new_ones(chunk.num_rows)))
    gradients.add_own(own, rows, terms.d_logps[0].to(head.dtype))
    return terms


def _in_two_passes(
    head: ChunkedHead, part: Pairs, chunk: Chunk, gradients: Gradients
) -> SequenceTerms:
    terms = _terms(head, part, _scored(head, chunk))
    _add(head, gradients, slice(chunk.start, chunk.end), part.to_rows(terms.d_logps))
    return terms


def _known_beforehand(
    head: ChunkedHead, part: Pairs, chunk: Chunk, gradients: Gradients
) -> SequenceTerms:
    """A unit whose derivatives are the coefficients that the caller gave."""
    coefficients = part.coefficients
    if coefficients is None:
        coefficients = torch.zeros_like(part.ref_logps)
    rows = slice(chunk.start, chunk.end)
    return _terms(head, part, _add(head, gradients, rows, part.to_rows(coefficients)))


def _add(
    head: ChunkedHead,
    gradients: Gradients,
    rows: slice,
    coefficients: Tensor,  # [n]
) -> ScoredRows:
    """Add the gradients of sum(coefficients * per_token_logps), and return the rows' scores."""
    found = []
    for subchunk in head.row_chunks(rows.start, rows.stop):
        scored = head.score(subchunk)
        found.append(replace(scored, kept=()))
        part = coefficients[subchunk.start - rows.start : subchunk.stop - rows.start]
        head.add_gradients(gradients, subchunk, scored, part)
    return joined_rows(found)


@dataclass(frozen=True, eq=False)
class _SummedPart:
    """Rows whose gradients are summed together, up to a factor that is known later.

    Attributes:
        rows: the rows, counted in the call.
        directions: derivative of the loss by the log-prob of each of the unit's sequences [2], up
            to the factor; 0 for sequences that aren't among the rows.
    """

    rows: slice
    directions: tuple[float, float]

    def factor(
        self,
        d_logps: Tensor,  # [2]
    ) -> Tensor:
        """[]: d_logps is this number times `directions`."""
        # Divide by the larger direction, because the smaller one can be 0.
        larger = int(abs(self.directions[1]) > abs(self.directions[0]))
        return d_logps[larger] / self.directions[larger]


def _summed_parts(part: Pairs, chunk: Chunk) -> list[_SummedPart]:
    """The rows of a pair that can be summed together: all of them, or one sequence at a time.

    If the two derivatives of the loss have a fixed ratio (see `PairLoss.direction`), one buffer
    takes both sequences.
    """
    limits = [limit + chunk.start for limit in part.limits]
    ((chosen, rejected),) = part.pair_list
    # This tensor stays on the host, where its numbers are: copying it to the device, or the
    # direction back, would make the host wait.
    lengths = torch.tensor(part.limits).diff()[[chosen, rejected]]  # [2]
    direction = part.loss.direction(lengths[None])  # [1, 2]
    if direction is None or part.coefficients is not None:
        return [
            _SummedPart(slice(limits[0], limits[1]), (1.0, 0.0)),
            _SummedPart(slice(limits[1], limits[2]), (0.0, 1.0)),
        ]
    of_pair = direction.flatten().tolist()
    directions = [0.0, 0.0]
    directions[chosen], directions[rejected] = of_pair
    return [_SummedPart(slice(limits[0], limits[2]), (directions[0], directions[1]))]


def _one_pair(head: ChunkedHead, part: Pairs, chunk: Chunk, gradients: Gradients) -> SequenceTerms:
    """A long pair in one pass: its gradients are summed first and multiplied last."""
    per_token_logps = part.ref_logps.new_zeros(chunk.num_rows, dtype=head.dtype)
    statistics = None
    if part.statistics:
        statistics = per_token_logps.new_zeros(len(part.statistics), chunk.num_rows)
    # WPO's weight depends on both answers.
    is_by_answer = part.loss.is_by_answer and part.weighting is None
    waiting: list[tuple[_SummedPart, Gradients]] = []
    for each in _summed_parts(part, chunk):
        own = head.own_gradients(gradients, len(waiting))
        within = slice(each.rows.start - chunk.start, each.rows.stop - chunk.start)
        coefficients = part.to_rows(part.ref_logps.new_tensor(each.directions))[within]
        scored = _add(head, own, each.rows, coefficients)
        per_token_logps[within] = scored.per_token_logps
        if statistics is not None and scored.statistics is not None:
            statistics[:, within] = scored.statistics
        if is_by_answer:
            # This answer's derivative doesn't depend on the other answer, which may not be scored
            # yet. So the buffer is free for the other one.
            terms = part.terms(head.ops, per_token_logps, statistics)
            gradients.add_own(own, each.rows, each.factor(terms.d_logps).to(head.dtype))
        else:
            waiting.append((each, own))
    terms = part.terms(head.ops, per_token_logps, statistics)
    for each, own in waiting:
        gradients.add_own(own, each.rows, each.factor(terms.d_logps).to(head.dtype))
    return terms
