"""The memory that a chunk's logits are made in."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

# Larger chunks don't make a CPU faster; on a GPU they keep the products wide.
CPU_WORKSPACE_BYTES = 160 * 2**20
DEVICE_WORKSPACE_BYTES = 10**9
# The lines of a workspace start at multiples of this: matrix units and vector loads want it so.
ALIGNMENT_BYTES = 128
# A CPU's large tensors go back to the system when freed, and come back as zeroed pages one by one,
# which costs as much as a pass over the logits. So each thread keeps what it worked in.
_kept = threading.local()


class Workspace:
    """Memory of logits [n, V], for one chunk after the other.

    Row by row, as Triton's kernels read them; or `vocab_major`, where a row of the vocabulary lies
    together. CPUs like that better: the weight's rows pass by once, each making a short row of
    logits, where else a product would write to hundreds of far apart lines at a time.

    Args:
        weight: [V, H], whose device it is for.
        num_rows: the most that a chunk will have.
        dtype: of the logits.
        vocab_major: whether strides are (1, n), not (V, 1); on a CPU alone. This memory is kept for
            the thread's next workspace, so what is made in it must be used up by then.
    """

    def __init__(
        self, weight: Tensor, num_rows: int, dtype: torch.dtype, vocab_major: bool
    ) -> None:
        self._vocab_size, self._vocab_major = len(weight), vocab_major
        if vocab_major:
            self._memory = _kept_memory(len(weight) * _aligned(num_rows, dtype), dtype)
        else:
            num_elements = num_rows * _aligned(len(weight), dtype)
            self._memory = weight.new_empty(num_elements, dtype=dtype)

    @property
    def num_bytes(self) -> int:
        return self._memory.nbytes

    def logits(self, num_rows: int) -> Tensor:
        """[num_rows, V] of nobody's numbers."""
        width, dtype = self._vocab_size, self._memory.dtype
        shape = (num_rows, width)
        if self._vocab_major:
            return self._memory.as_strided(shape, (1, _aligned(num_rows, dtype)))
        return self._memory.as_strided(shape, (_aligned(width, dtype), 1))


def max_workspace_rows(weight: Tensor, dtype: torch.dtype, limit: int | None) -> int:
    """Rows of a workspace [rows, V] of that dtype that `limit` bytes allow, at least one.

    Without a limit the device's own holds.
    """
    if limit is None:
        limit = CPU_WORKSPACE_BYTES if weight.device.type == "cpu" else DEVICE_WORKSPACE_BYTES
    num_rows = max(1, limit // (_aligned(len(weight), dtype) * dtype.itemsize))
    step = _line(dtype)
    return num_rows - num_rows % step if num_rows > step else num_rows


def _kept_memory(num_elements: int, dtype: torch.dtype) -> Tensor:
    num_bytes = num_elements * dtype.itemsize
    if num_bytes > CPU_WORKSPACE_BYTES:
        return torch.empty(num_elements, dtype=dtype, device="cpu")
    memory: Tensor | None = getattr(_kept, "memory", None)
    if memory is None or len(memory) < num_bytes:
        with torch.inference_mode(False):  # what is made inside can't be written to outside
            memory = _kept.memory = torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
    return memory[:num_bytes].view(dtype)


def _aligned(length: int, dtype: torch.dtype) -> int:
    """Elements from one line of `length` elements to the next."""
    step = _line(dtype)
    return -(-length // step) * step if length > step else max(length, 1)


def _line(dtype: torch.dtype) -> int:
    return ALIGNMENT_BYTES // dtype.itemsize
