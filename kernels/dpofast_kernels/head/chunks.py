"""How rows are cut into chunks, and the memory that a chunk's logits are made in."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Larger chunks don't make a CPU faster; on a GPU they keep the products wide.
CPU_WORKSPACE_BYTES = 160 * 2**20
DEVICE_WORKSPACE_BYTES = 10**9
# A CPU's large tensors go back to the system when freed, and come back as zeroed pages one by one,
# which costs as much as a pass over the logits. So each thread keeps what it worked in.
_kept = threading.local()
# Where a chunk keeps nothing of the size of the vocabulary.
FORWARD_ROWS = 2**13
# Rows of logits start at multiples of this: matrix units and vector loads want them aligned.
ROW_ALIGNMENT_BYTES = 128


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


def max_chunk_rows(weight: Tensor, dtype: torch.dtype | None, limit: int | None) -> int:
    """Rows of a workspace [rows, V] of that dtype that `limit` bytes allow, at least one.

    Without a limit the device's own holds; without a dtype nothing of that size is kept.
    """
    if dtype is None:
        return FORWARD_ROWS
    if limit is None:
        limit = CPU_WORKSPACE_BYTES if weight.device.type == "cpu" else DEVICE_WORKSPACE_BYTES
    return max(1, limit // (_row_width(len(weight), dtype) * dtype.itemsize))


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


def new_workspace(
    weight: Tensor,  # [V, H]
    num_rows: int,
    dtype: torch.dtype,
) -> Tensor:
    """[num_rows, V] of nobody's numbers, on the device of the weight."""
    width = _row_width(len(weight), dtype)
    return weight.new_empty(num_rows, width, dtype=dtype)[:, : len(weight)]


def kept_workspace(
    weight: Tensor,  # [V, H]
    num_rows: int,
    dtype: torch.dtype,
) -> Tensor:
    """As `new_workspace`, but on a CPU it is this thread's next one, too.

    What is made in it must be used up by then.
    """
    width = _row_width(len(weight), dtype)
    num_bytes = num_rows * width * dtype.itemsize
    if weight.device.type != "cpu" or num_bytes > CPU_WORKSPACE_BYTES:
        return new_workspace(weight, num_rows, dtype)
    memory: Tensor | None = getattr(_kept, "memory", None)
    if memory is None or len(memory) < num_bytes:
        with torch.inference_mode(False):  # what is made inside can't be written to outside
            memory = _kept.memory = torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
    return memory[:num_bytes].view(dtype).view(num_rows, width)[:, : len(weight)]


def _row_width(vocab_size: int, dtype: torch.dtype) -> int:
    """Elements from one row of logits to the next."""
    step = ROW_ALIGNMENT_BYTES // dtype.itemsize
    return max(-(-vocab_size // step), 1) * step
