"""How the head cuts the rows of pairs into chunks; pairs are never cut here."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

# Rows of a chunk that make its products large enough to be fast.
ROWS_WANTED = 4096
# Bytes that a call may take beyond inputs, gradients and an fp32 gradient of the weight.
MEMORY_RULE_BYTES = 1.5e9
BF16 = 2


def greedy_chunks(pair_rows: Sequence[int], most_rows: int) -> list[int]:
    """Rows of each chunk as the head cut them at 086dbb7: pairs are taken while they fit."""
    chunks: list[int] = []
    for rows in pair_rows:
        if chunks and chunks[-1] + rows <= most_rows:
            chunks[-1] += rows
        else:
            chunks.append(rows)
    return chunks


def even_chunks(pair_rows: Sequence[int], hidden_size: int, vocab_size: int) -> list[int]:
    """Rows of each chunk: one chunk where it has room, else even ones of about ROWS_WANTED.

    A single chunk needs no fp32 gradient of the weight, so its logits get that gradient's room.

    Args:
        pair_rows: [P], scored rows of each pair.
        hidden_size: H.
        vocab_size: V.
    """
    total, weights = sum(pair_rows), hidden_size * vocab_size
    room = MEMORY_RULE_BYTES + 2 * weights - 2 * total * hidden_size
    if total * vocab_size * BF16 <= room + 2 * weights:
        return [total]
    for count in range(max(2, round(total / ROWS_WANTED)), len(pair_rows)):
        chunks = _cut(pair_rows, count)
        if max(chunks) * vocab_size * BF16 <= room:
            return chunks
    return list(pair_rows)


def _cut(pair_rows: Sequence[int], count: int) -> list[int]:
    """Cut where the rows before a pair come nearest to equal shares of all rows."""
    ends = [0]
    for rows in pair_rows:
        ends.append(ends[-1] + rows)
    total = ends[-1]
    cuts = {min(ends, key=lambda end: abs(end - total * i / count)) for i in range(count + 1)}
    places = sorted(cuts)
    return [end - start for start, end in pairwise(places)]
