"""Finds NaN and infinity in weights and other tensors, without a copy of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dpofast.reference.identity.quantised import is_quantised


def own_part(tensor: Any) -> Tensor:
    """What this rank holds of a tensor that ZeRO-3 may have sharded; without gradients."""
    part: Tensor = getattr(tensor, "ds_tensor", tensor)
    return part.detach()


def non_finite_flags(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Which tensors have a NaN or infinite element in this rank's part; the host doesn't wait.

    Args:
        tensors: n tensors of any shape, dtype and device.
        device: device of the result.

    Returns:
        [n] bool.
    """
    flags = [_largest(tensor).isfinite().logical_not().to(device) for tensor in tensors]
    return torch.stack(flags) if flags else torch.zeros(0, dtype=torch.bool, device=device)


def non_finite_names(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the tensors that have a NaN or infinite element in this rank's part."""
    named = list(tensors)
    flags = non_finite_flags((tensor for _, tensor in named), torch.device("cpu"))
    return [name for (name, _), is_bad in zip(named, flags.tolist(), strict=True) if is_bad]


def trained_weights(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that a run trains, by name."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _largest(tensor: Tensor) -> Tensor:
    """[]: the largest magnitude; NaN if any element is."""
    part = own_part(tensor)
    # The bits of a quantised weight aren't those of numbers, whatever dtype it is stored in. Floats
    # of one byte are such storage, too; no reduction takes them.
    is_number = part.is_floating_point() and part.element_size() > 1 and not is_quantised(tensor)
    if not part.numel() or not is_number:
        return torch.zeros((), device=part.device)
    return torch.linalg.vector_norm(part, float("inf"))
