"""Gradient clipping by a norm that is summed in float64, as DeepSpeed's is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

CHUNK_ELEMENTS = 1 << 20  # cast at a time: PyTorch makes a float64 copy of what it sums


class ClipsExactly:
    """Part of a transformers Trainer: what it clips by, and logs, is summed in float64."""

    args: Any
    accelerator: Any
    is_deepspeed_enabled: bool

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return self._clipped(model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return self._clipped(model, math.inf) if grad_norm is None else grad_norm

    def _clipped(self, model: nn.Module, max_norm: float) -> Any:
        if self.is_deepspeed_enabled:  # its engine has clipped, and tells its norm
            return self.accelerator.clip_grad_norm_(model.parameters(), max_norm)
        self.accelerator.unscale_gradients()
        return clip_grad_norm(model.parameters(), max_norm)


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients down where their joint norm is above `max_norm`.

    As `torch.nn.utils.clip_grad_norm_`, whose sum on a CPU loses digits: it is off by 1e-4 with a
    matrix of 4 million elements, by 5e-3 with one of 60 million. A GPU sums a matrix in thousands
    of parts, which float32 is enough for; its float64 copy would be as large as two of them.

    Args:
        parameters: those without a gradient are passed over.
        max_norm: infinity only measures.

    Returns:
        [] float64, the norm before; inf or NaN where a gradient is.
    """
    parameters = [p for p in parameters if p.grad is not None]
    squares = [_sum_of_squares(p.grad) for p in parameters if p.grad is not None]
    if not squares:
        return torch.zeros((), dtype=torch.float64)
    norm = torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def _sum_of_squares(gradient: Tensor) -> Tensor:
    if not gradient.is_cpu:
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        return torch.linalg.vector_norm(gradient, dtype=dtype).double().square()
    parts = torch.split(gradient.flatten(), CHUNK_ELEMENTS)
    norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts]
    return torch.stack(norms).square().sum()
