"""A GPU's TF32, emulated on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm")


class Tf32(TorchDispatchMode):
    """Rounds the factors of float32 matrix products to mantissas of 10 bits, while it is active."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._schema.name in _PRODUCTS:
            *added, left, right = args
            args = (*added, _rounded(left), _rounded(right))
        return func(*args, **(kwargs or {}))


def _rounded(factor: Tensor) -> Tensor:
    if factor.dtype != torch.float32:
        return factor
    bits = factor.contiguous().view(torch.int32)
    # float32 has 23 bits of mantissa: add half of the last bit that is kept, then drop 13 bits.
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
