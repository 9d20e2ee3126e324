"""How rows are cut into chunks, and the memory for a chunk's logits.

The workspace limits the rows of a chunk: the chunk's logits [n, V] must fit into it. The workspace
is allocated once per call, and every chunk of the call uses it again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

# Larger chunks don't make a CPU faster. On a GPU they make the matrix products large, which it
# needs to be fast.
CPU_WORKSPACE_BYTES = 160 * 2**20
DEVICE_WORKSPACE_BYTES = 10**9
# Rows in a chunk if the back end needs no workspace [n, V].
FORWARD_ROWS = 2**13
# Bytes from the start of one row to the next are a multiple of this: matrix units and vector loads
# want every row to have the same alignment.
ROW_ALIGNMENT_BYTES = 128
# A CPU's matrix product works on this many rows at a time. It is much slower on a remainder of
# fewer rows.
ROWS_AT_A_TIME = 16
# When a large CPU tensor is freed, its pages go back to the system. To allocate it again, the
# system zeroes each page and takes a page fault for it, which costs as much as a pass over the
# logits. So each thread keeps the memory of its last workspace.
thread_memory = threading.local()


def max_chunk_rows(
    weight: Tensor, dtype: torch.dtype | None, limit: int | None, vocab_major: bool
) -> int:
    """The most rows that a chunk can have.

    Args:
        weight: [V, H].
        dtype: dtype of the workspace; None if the back end needs no workspace.
        limit: bytes that the workspace may take; None for the device's default.
        vocab_major: layout of the workspace, see `Workspace`.

    Returns:
        At least 1; with `vocab_major` a multiple of 16.
    """
    if dtype is None:
        return FORWARD_ROWS
    if limit is None:
        limit = CPU_WORKSPACE_BYTES if weight.device.type == "cpu" else DEVICE_WORKSPACE_BYTES
    if vocab_major:
        num_rows = limit // (max(len(weight), 1) * dtype.itemsize)
        return max(num_rows - num_rows % ROWS_AT_A_TIME, ROWS_AT_A_TIME)
    return max(1, limit // (_row_width(len(weight), dtype) * dtype.itemsize))


def row_chunks(start: int, end: int, max_rows: int) -> Iterator[slice]:
    """Cut rows start:end into as few chunks as possible, of nearly equal size."""
    count = -(-(end - start) // max_rows)
    size = -(-(end - start) // max(count, 1))
    for first in range(start, end, max(size, 1)):
        yield slice(first, min(first + size, end))


class Workspace:
    """Memory for logits [n, V], used again by every chunk.

    By default a row is contiguous, because the Triton kernels read rows. With `vocab_major` a
    column is contiguous: the logits of one vocabulary entry in all rows. That is faster on a CPU,
    whose matrix product reads the weights of an entry and writes one short column. With contiguous
    rows it would write to hundreds of places far apart.

    Args:
        weight: [V, H], gives the vocabulary size and the device.
        num_rows: the most rows that a chunk will have.
        dtype: dtype of the logits.
        vocab_major: whether columns are contiguous; only on a CPU. The thread's next workspace can
            get the same memory and overwrite these logits.
    """

    def __init__(
        self, weight: Tensor, num_rows: int, dtype: torch.dtype, vocab_major: bool
    ) -> None:
        self._vocab_size, self._vocab_major = len(weight), vocab_major
        if vocab_major:
            self._memory = _memory_of_thread(len(weight) * _padded_rows(num_rows), dtype)
        else:
            self._memory = weight.new_empty(num_rows * _row_width(len(weight), dtype), dtype=dtype)

    def logits(self, num_rows: int) -> Tensor:
        """[m, V], uninitialised; m is `num_rows`, or the next multiple of 16 if `vocab_major`."""
        if self._vocab_major:
            height = _padded_rows(num_rows)
            return self._memory.as_strided((height, self._vocab_size), (1, height))
        width = _row_width(self._vocab_size, self._memory.dtype)
        return self._memory.as_strided((num_rows, self._vocab_size), (width, 1))


def _memory_of_thread(num_elements: int, dtype: torch.dtype) -> Tensor:
    num_bytes = num_elements * dtype.itemsize
    if num_bytes > CPU_WORKSPACE_BYTES:
        return torch.empty(num_elements, dtype=dtype, device="cpu")
    memory: Tensor | None = getattr(thread_memory, "memory", None)
    if memory is None or len(memory) < num_bytes:
        # A tensor made in inference mode could not be written to by a later training step.
        with torch.inference_mode(False):
            memory = thread_memory.memory = torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
    return memory[:num_bytes].view(dtype)


def _row_width(vocab_size: int, dtype: torch.dtype) -> int:
    """Elements from the start of one row of logits to the next."""
    step = ROW_ALIGNMENT_BYTES // dtype.itemsize
    return max(-(-vocab_size // step), 1) * step


def _padded_rows(num_rows: int) -> int:
    return -(-num_rows // ROWS_AT_A_TIME) * ROWS_AT_A_TIME
