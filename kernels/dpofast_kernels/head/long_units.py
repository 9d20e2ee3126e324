"""Units that don't fit into one chunk: their losses are known only after their last piece.

A piece is a run of a unit's rows that fits into a chunk. The gradient of a pair is
d_chosen G_chosen + d_rejected G_rejected, where G is the gradient of a sequence's log-prob, and the
two factors are known last. There are two ways, and neither needs a second sum of the weight's size:

- Sum first, multiply last. This works if one factor serves all rows: a single answer, or a pair
  whose two derivatives have a fixed ratio (see `PairLoss.direction`). It also takes gradients to
  which nothing else was added yet, as the factor would multiply that, too.
- Score all pieces but the last one, without gradients. With the last one the loss is known. The
  gradients of the last piece follow at once; the others are computed a second time.

If the derivative with respect to an answer's log-prob depends on that answer alone, it is known
after the answer's own rows. Such an answer takes these ways by itself, and fits into a chunk more
often.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from dpofast_kernels.head.chunked import ChunkedHead, Gradients
from dpofast_kernels.head.pairs import Pairs, SequenceTerms
from dpofast_kernels.head.rows import ScoredRows
from dpofast_kernels.head.singles import Singles
from dpofast_kernels.head.units import Chunk


def long_unit(
    head: ChunkedHead,
    part: Pairs | Singles,
    chunk: Chunk,
    gradients: Gradients | None,
    upstream: float,
) -> SequenceTerms:
    """Score a unit piece by piece, and add its gradients.

    Args:
        head: the head of the call.
        part: the unit's sequences and pairs, or a single answer.
        chunk: the unit.
        gradients: gradients to add to; None if none are wanted.
        upstream: factor of the gradients.
    """
    unit = _LongUnit(head, part, chunk)
    if gradients is None:
        unit.score(chunk.start, chunk.end)
        return unit.terms()
    if isinstance(part, Pairs) and (part.loss.is_zero or not chunk.num_pairs):
        known = part.coefficients
        known = torch.zeros_like(part.ref_logps) if known is None else known
        unit.add(gradients, chunk.start, chunk.end, known * upstream)
        return unit.terms()
    directions = _directions(part, chunk)
    if gradients.is_empty and directions is not None:
        return _multiplied_last(unit, gradients, directions, upstream)
    for start, end in _known_apart(part, chunk):
        _last_piece_first(unit, gradients, start, end, upstream)
    return unit.terms()


class _LongUnit:
    """A unit, and what is known of its rows so far."""

    def __init__(self, head: ChunkedHead, part: Pairs | Singles, chunk: Chunk) -> None:
        self.head, self.part, self.chunk = head, part, chunk
        self._logps = part.ref_logps.new_zeros(chunk.num_rows, dtype=head.dtype)
        self._statistics: Tensor | None = None
        if part.statistics:
            self._statistics = self._logps.new_zeros(len(part.statistics), chunk.num_rows)

    def pieces(self, start: int, end: int) -> list[slice]:
        if end - start <= self.head.limits.most:
            return [slice(start, end)]
        return self.head.row_chunks(start, end)

    def score(self, start: int, end: int) -> None:
        """Score rows that get no gradient now."""
        for rows in self.pieces(start, end):
            self.note(rows, self.head.score(rows, keep=False))

    def add(self, gradients: Gradients, start: int, end: int, d_logps: Tensor) -> None:
        """Score rows and add their gradients, given the loss's derivatives `d_logps` [S]."""
        for rows in self.pieces(start, end):
            scored = self.head.score(rows)
            self.note(rows, scored)
            self.add_scored(gradients, rows, scored, d_logps)

    def add_scored(
        self, gradients: Gradients, rows: slice, scored: ScoredRows, d_logps: Tensor
    ) -> None:
        coefficients = self.part.to_rows(d_logps)[self._within(rows)]
        self.head.add_gradients(gradients, rows, scored, coefficients)

    def note(self, rows: slice, scored: ScoredRows) -> None:
        within = self._within(rows)
        self._logps[within] = scored.per_token_logps
        if self._statistics is not None and scored.statistics is not None:
            self._statistics[:, within] = scored.statistics

    def terms(self) -> SequenceTerms:
        """The losses, once all rows they depend on are noted."""
        return self.part.terms(self.head.ops, self._logps, self._statistics)

    def _within(self, rows: slice) -> slice:
        return slice(rows.start - self.chunk.start, rows.stop - self.chunk.start)


def _last_piece_first(
    unit: _LongUnit, gradients: Gradients, start: int, end: int, upstream: float
) -> None:
    """Score rows, and add their gradients: those of the last piece while its logits are there."""
    *others, last = unit.pieces(start, end)
    for rows in others:
        unit.note(rows, unit.head.score(rows, keep=False))
    scored = unit.head.score(last)
    unit.note(last, scored)
    d_logps = unit.terms().d_logps * upstream
    unit.add_scored(gradients, last, scored, d_logps)
    for rows in others:
        unit.add_scored(gradients, rows, unit.head.score(rows), d_logps)


def _multiplied_last(
    unit: _LongUnit, gradients: Gradients, directions: tuple[float, ...], upstream: float
) -> SequenceTerms:
    """Sum the gradients up to one factor, which is known last."""
    rows = slice(unit.chunk.start, unit.chunk.end)
    # `new_tensor` would make the host wait for a device.
    like = unit.part.ref_logps
    d_logps = torch.tensor(directions, dtype=like.dtype).to(like.device, non_blocking=True)
    unit.add(gradients, rows.start, rows.stop, d_logps)
    terms = unit.terms()
    # Divide by the larger direction, because the smaller one can be 0.
    larger = max(range(len(directions)), key=lambda index: abs(directions[index]))
    factor = terms.d_logps[larger] * (upstream / directions[larger])
    gradients.scale(rows, factor.to(unit.head.dtype), unit.head.backend)
    return terms


def _directions(part: Pairs | Singles, chunk: Chunk) -> tuple[float, ...] | None:
    """The loss's derivatives with respect to the unit's log-probs, up to one factor; or None.

    None means that no factor serves all of them.
    """
    if isinstance(part, Singles):
        return (1.0,)
    if chunk.num_sequences != 2 or chunk.num_pairs != 1 or part.coefficients is not None:
        return None
    ((chosen, rejected),) = part.pair_list
    # This tensor stays on the host, where its numbers are: copying it to the device, or the
    # direction back, would make the host wait.
    lengths = torch.tensor(part.limits).diff()[[chosen, rejected]]  # [2]
    direction = part.loss.direction(lengths[None])  # [1, 2]
    if direction is None:
        return None
    directions = [0.0, 0.0]
    directions[chosen], directions[rejected] = direction.flatten().tolist()
    return tuple(directions)


def _known_apart(part: Pairs | Singles, chunk: Chunk) -> list[tuple[int, int]]:
    """Runs of rows whose derivatives depend on the run's own log-probs alone: start and end."""
    limits = [limit + chunk.start for limit in part.limits]
    # WPO's weight depends on both answers.
    if isinstance(part, Pairs) and part.loss.is_by_answer and part.weighting is None:
        return list(pairwise(limits))
    return [(limits[0], limits[-1])]
