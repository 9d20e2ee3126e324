"""Gradient clipping by a norm that is summed in float64, as DeepSpeed's is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

# To sum in float64, PyTorch first makes a float64 copy. In chunks of this size it stays small.
CHUNK_ELEMENTS = 1 << 20


class ClipsExactly:
    """Makes a transformers Trainer clip by, and log, a gradient norm that is summed in float64.

    It comes before Trainer among a class's bases, and overrides two of its methods.
    """

    args: Any
    accelerator: Any
    is_deepspeed_enabled: bool

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return self._clipped(model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Without clipping no norm has been computed; an infinite bound only measures it.
        return self._clipped(model, math.inf) if grad_norm is None else grad_norm

    def _clipped(self, model: nn.Module, max_norm: float) -> Any:
        if self.is_deepspeed_enabled:  # its engine clips by itself, and this returns its norm
            return self.accelerator.clip_grad_norm_(model.parameters(), max_norm)
        self.accelerator.unscale_gradients()
        return clip_grad_norm(model.parameters(), max_norm)


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales the gradients down if their joint norm is above `max_norm`.

    This does what `torch.nn.utils.clip_grad_norm_` does, whose sum loses digits on a CPU: it is off
    by 1e-4 for a matrix of 4 million elements, and by 5e-3 for one of 60 million.

    Args:
        parameters: parameters; those without a gradient are left out.
        max_norm: largest norm; infinity measures the norm and scales nothing.

    Returns:
        [] float64, the norm before scaling; inf or NaN if a gradient has such an element, and then
        no gradient is scaled.

    Numerics: on a CPU all sums are in float64. On a GPU the norm of one gradient is summed in
    float32 or its own wider dtype, and the sum over gradients is in float64. The factor of the
    gradients is computed in float64, and rounded once: to their dtype on a GPU, to float32 or wider
    on a CPU.
    """
    gradients = _by_device_and_dtype(p.grad for p in parameters if p.grad is not None)
    if not gradients:
        return torch.zeros((), dtype=torch.float64)
    squares = [_squares(group) for group in gradients]
    norm = torch.cat([each.to(squares[0].device) for each in squares]).sum().sqrt()
    if max_norm < math.inf:
        # A norm that isn't finite would spread to all gradients, and hide the one that it comes
        # from. A norm of 0 scales nothing.
        bound = torch.where(norm.isfinite(), norm, 0.0)
        factor = (max_norm / (bound + 1e-6)).clamp(max=1.0)
        for group in gradients:
            _scale(group, factor)
    return norm


def _by_device_and_dtype(gradients: Iterable[Tensor]) -> list[list[Tensor]]:
    """The gradients in groups that one kernel can take."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        groups.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    return list(groups.values())


def _squares(group: list[Tensor]) -> Tensor:
    """[g] float64: for each of g gradients, the sum of the squares of its elements."""
    if group[0].is_cpu:
        return torch.stack([_sum_of_squares(gradient) for gradient in group])
    # A GPU sums a matrix in thousands of parts, so float32 is enough. A float64 copy of the matrix
    # would take twice the memory of the gradient.
    dtype = torch.promote_types(group[0].dtype, torch.float32)
    return torch.stack(torch._foreach_norm(group, 2, dtype=dtype)).double().square()


def _sum_of_squares(gradient: Tensor) -> Tensor:
    """[] float64, summed in float64."""
    parts = torch.split(gradient.flatten(), CHUNK_ELEMENTS)
    norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts]
    return torch.stack(norms).square().sum()


def _scale(
    group: list[Tensor],
    factor: Tensor,  # [] float64
) -> None:
    """Multiply the gradients of a group by `factor`, in place."""
    factor = factor.to(group[0].device)
    if not group[0].is_cpu:
        # With a factor of another dtype, PyTorch runs a kernel for each gradient that casts every
        # element. It would round the factor in the same way. A CPU keeps the digits of a wide one.
        factor = factor.to(group[0].dtype)
    torch._foreach_mul_(group, factor)
