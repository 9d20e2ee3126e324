"""How many rows a chunk may have, and the memory for a chunk's logits.

The workspace limits the rows of a chunk: the chunk's logits [n, V] must fit into it. The workspace
is allocated once per call, and every chunk of the call uses it again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

# Larger chunks don't make a CPU faster. A pair may have as many rows as fit the second limit: past
# that it is scored piece by piece, most pieces twice.
CPU_WORKSPACE_BYTES = 160 * 2**20
CPU_LONGEST_BYTES = 640 * 2**20
# What a call may take on a GPU beyond its inputs, their gradients and the weight's gradient in
# fp32, with HIDDEN_ROWS scored tokens.
DEVICE_WORKSPACE_BYTES = 1_500_000_000
HIDDEN_ROWS = 2**15
# Rows of a chunk on a GPU, if they fit. Each further chunk reads and writes the sum of the weight's
# gradients, which beside this many rows takes a small part of the products' time.
WANTED_ROWS = 2**12
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


class WeightGrad(Enum):
    """How a call makes the gradient of the weight, and so what memory it leaves for logits."""

    NONE = "none"
    SUMMED = "summed"  # in fp32, and cast at the end
    ROUNDED = "rounded"  # written into the weight's dtype at once; only if there is one chunk


@dataclass(frozen=True)
class ChunkLimits:
    """How many rows a chunk of one call has.

    Attributes:
        wanted: rows of a chunk, where the units allow. A call of at most this many is one chunk.
        most: rows above which a unit doesn't fit into a chunk.
        full: rows of a workspace of full size; a call that is one chunk may take more.
    """

    wanted: int
    most: int
    full: int


def chunk_limits(
    num_rows: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    workspace_dtype: torch.dtype | None,
    device_type: str,
    limit: int | None,
    vocab_major: bool,
    weight_grad: WeightGrad,
) -> ChunkLimits:
    """The limits of a call's chunks.

    Args:
        num_rows: N.
        shape: V and H.
        dtype: dtype that the call computes in.
        workspace_dtype: dtype of the workspace; None if the back end needs no workspace.
        device_type: "cpu" or that of another device.
        limit: bytes that the workspace may take; None for the device's default.
        vocab_major: layout of the workspace, see `Workspace`.
        weight_grad: how the weight's gradient is made if the call is a single chunk.

    Returns:
        Numbers of at least 1; with `vocab_major` multiples of 16.
    """
    if workspace_dtype is None:
        return ChunkLimits(FORWARD_ROWS, FORWARD_ROWS, FORWARD_ROWS)
    width = shape[0] if vocab_major else _row_width(shape[0], workspace_dtype)
    row_bytes = max(width, 1) * workspace_dtype.itemsize

    def rows_in(num_bytes: int) -> int:
        rows, step = num_bytes // row_bytes, ROWS_AT_A_TIME if vocab_major else 1
        return max(rows - rows % step, step)

    if limit is not None:
        rows = rows_in(limit)
        return ChunkLimits(rows, rows, rows)
    if device_type == "cpu":
        wanted = rows_in(CPU_WORKSPACE_BYTES)
        return ChunkLimits(wanted, max(rows_in(CPU_LONGEST_BYTES), wanted), wanted)
    several = WeightGrad.NONE if weight_grad is WeightGrad.NONE else WeightGrad.SUMMED
    full = rows_in(_device_bytes(shape, dtype, several))
    whole = max(rows_in(_device_bytes(shape, dtype, weight_grad)), full)
    if num_rows <= whole:
        return ChunkLimits(whole, whole, full)
    return ChunkLimits(min(WANTED_ROWS, full), full, full)


def _device_bytes(shape: tuple[int, int], dtype: torch.dtype, weight_grad: WeightGrad) -> int:
    """Bytes for logits on a GPU, so that a call keeps to DEVICE_WORKSPACE_BYTES.

    The gradients in the inputs' dtypes don't count, and they are made after the last chunk. So
    while there are logits, their memory is free. A rounded gradient of the weight is there from the
    start, but then there is none in fp32, which doesn't count either.
    """
    vocab_size, hidden_size = shape
    narrower = max(torch.float32.itemsize - dtype.itemsize, 0)
    sums = narrower * hidden_size * HIDDEN_ROWS  # what fp32 sums take beyond the gradients
    free = {
        WeightGrad.NONE: 0,
        WeightGrad.SUMMED: dtype.itemsize if narrower else 0,
        WeightGrad.ROUNDED: torch.float32.itemsize,
    }
    # Whatever the hidden size, a third of the limit is left.
    most = max(DEVICE_WORKSPACE_BYTES - sums, DEVICE_WORKSPACE_BYTES // 3)
    return most + free[weight_grad] * vocab_size * hidden_size


def row_chunks(start: int, end: int, max_rows: int) -> Iterator[slice]:
    """Cut rows start:end into as few chunks as possible, of nearly equal size."""
    count = -(-(end - start) // max_rows)
    size = -(-(end - start) // max(count, 1))
    for first in range(start, end, max(size, 1)):
        yield slice(first, min(first + size, end))


def rows_to_allocate(num_rows: int, limits: ChunkLimits) -> int:
    """Rows of a device's workspace: `limits.full`, or a half, a quarter, ... of it.

    The number of rows differs from call to call. PyTorch's allocator reuses blocks of a few sizes;
    if every block had another size, they would leave gaps.
    """
    size = limits.full
    if num_rows > size:
        return max(limits.most, num_rows)
    while size // 2 >= max(num_rows, 1):
        size //= 2
    return size


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
        self.num_rows = num_rows
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
