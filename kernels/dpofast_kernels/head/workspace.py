"""The memory that a chunk's logits are made in."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

# Larger chunks don't make a CPU faster; on a GPU they keep the products wide.
CPU_WORKSPACE_BYTES = 160 * 2**20
DEVICE_WORKSPACE_BYTES = 10**9
# Between the beginnings of two rows: matrix units and vector loads want them alike in alignment.
ROW_ALIGNMENT_BYTES = 128
# A CPU's products make so many rows at a time; with a few more or fewer they are much slower.
ROWS_AT_A_TIME = 16
# A CPU's large tensors go back to the system when freed, and come back as zeroed pages one by one,
# which costs as much as a pass over the logits. So each thread keeps what it worked in.
_kept = threading.local()


class Workspace:
    """Memory of logits [n, V], for one chunk after the other.

    Row by row, as Triton's kernels read them; or `vocab_major`, where a column, one token's logits
    in all rows, lies together. CPUs like that better: the weight passes by once, each of its rows
    making a short column, where else a product would write to hundreds of far apart rows at a time.

    Args:
        weight: [V, H], whose device it is for.
        num_rows: the most that a chunk will have.
        dtype: of the logits.
        vocab_major: on a CPU alone. This memory is kept for the thread's next workspace, so what is
            made in it must be used up by then.
    """

    def __init__(
        self, weight: Tensor, num_rows: int, dtype: torch.dtype, vocab_major: bool
    ) -> None:
        self._vocab_size, self._vocab_major = len(weight), vocab_major
        if vocab_major:
            self._memory = _kept_memory(len(weight) * _padded_rows(num_rows), dtype)
        else:
            self._memory = weight.new_empty(num_rows * _row_width(len(weight), dtype), dtype=dtype)

    def logits(self, num_rows: int) -> Tensor:
        """[m, V] of nobody's numbers; m is `num_rows`, if vocab_major rounded up to 16."""
        if self._vocab_major:
            height = _padded_rows(num_rows)
            return self._memory.as_strided((height, self._vocab_size), (1, height))
        width = _row_width(self._vocab_size, self._memory.dtype)
        return self._memory.as_strided((num_rows, self._vocab_size), (width, 1))


def max_workspace_rows(
    weight: Tensor, dtype: torch.dtype, limit: int | None, vocab_major: bool
) -> int:
    """Rows of a workspace of that dtype that `limit` bytes allow; at least 1, if vocab_major 16.

    Without a limit the device's own holds.
    """
    if limit is None:
        limit = CPU_WORKSPACE_BYTES if weight.device.type == "cpu" else DEVICE_WORKSPACE_BYTES
    if vocab_major:
        num_rows = limit // (max(len(weight), 1) * dtype.itemsize)
        return max(num_rows - num_rows % ROWS_AT_A_TIME, ROWS_AT_A_TIME)
    return max(1, limit // (_row_width(len(weight), dtype) * dtype.itemsize))


def _kept_memory(num_elements: int, dtype: torch.dtype) -> Tensor:
    num_bytes = num_elements * dtype.itemsize
    if num_bytes > CPU_WORKSPACE_BYTES:
        return torch.empty(num_elements, dtype=dtype, device="cpu")
    memory: Tensor | None = getattr(_kept, "memory", None)
    if memory is None or len(memory) < num_bytes:
        with torch.inference_mode(False):  # what is made inside can't be written to outside
            memory = _kept.memory = torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
    return memory[:num_bytes].view(dtype)


def _row_width(vocab_size: int, dtype: torch.dtype) -> int:
    """Elements from one row of logits to the next."""
    step = ROW_ALIGNMENT_BYTES // dtype.itemsize
    return max(-(-vocab_size // step), 1) * step


def _padded_rows(num_rows: int) -> int:
    return -(-num_rows // ROWS_AT_A_TIME) * ROWS_AT_A_TIME
