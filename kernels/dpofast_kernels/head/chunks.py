"""How rows are cut into chunks, so that a chunk's logits fit a workspace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Larger chunks don't make a CPU faster; on a GPU they keep the products wide.
CPU_WORKSPACE_BYTES = 160 * 2**20
DEVICE_WORKSPACE_BYTES = 2**30


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


def max_chunk_rows(weight: Tensor, dtype: torch.dtype) -> int:
    """Rows of logits [rows, V] of that dtype that the workspace holds, at least one."""
    workspace = CPU_WORKSPACE_BYTES if weight.device.type == "cpu" else DEVICE_WORKSPACE_BYTES
    return max(1, workspace // (max(len(weight), 1) * dtype.itemsize))


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
