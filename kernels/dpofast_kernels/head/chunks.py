"""How rows are cut into chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpofast_kernels.head.workspace import max_workspace_rows

# Where a chunk keeps nothing of the size of the vocabulary.
FORWARD_ROWS = 2**13


@dataclass(frozen=True)
class PairChunk:
    """Pairs first:last, whole, at rows start:end."""

    first: int
    last: int
    start: int
    end: int

    @property
    def num_rows(self) -> int:
        return self.end - self.start


def max_chunk_rows(
    weight: Tensor, dtype: torch.dtype | None, limit: int | None, vocab_major: bool
) -> int:
    """Rows of logits that may be made at a time: see `max_workspace_rows`.

    Without a dtype nothing of that size is kept.
    """
    return FORWARD_ROWS if dtype is None else max_workspace_rows(weight, dtype, limit, vocab_major)


def row_chunks(start: int, end: int, max_rows: int) -> Iterator[slice]:
    """Cut start:end into as few chunks as may be, of nearly equal size."""
    count = -(-(end - start) // max_rows)
    size = -(-(end - start) // max(count, 1))
    for first in range(start, end, max(size, 1)):
        yield slice(first, min(first + size, end))


def pair_chunks(limits: Sequence[int], max_rows: int) -> Iterator[PairChunk]:
    """Cut whole pairs into chunks of at most `max_rows` rows; a longer pair is alone in its chunk.

    Args:
        limits: [2P+1] limits of the sequences.
        max_rows: that a chunk may have.
    """
    num_pairs = len(limits) // 2
    first = 0
    while first < num_pairs:
        last = first + 1
        while last < num_pairs and limits[2 * last + 2] - limits[2 * first] <= max_rows:
            last += 1
        yield PairChunk(first, last, limits[2 * first], limits[2 * last])
        first = last
