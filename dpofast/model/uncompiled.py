"""Takes off what torch.compile puts around a model, or around parts of it."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from dpofast.errors import ConfigError

logger = logging.getLogger(__name__)

INNER = "_orig_mod"  # torch.compile's name for the module that it wraps
IN_PLACE = "_compiled_call_impl"  # where module.compile() keeps what it has compiled


def uncompiled(model: Any, argument: str) -> Any:
    """The model without the wrappers of torch.compile, which would rename its weights.

    A wrapper puts its own name into those of the weights, and from_pretrained doesn't find them in
    the saved file. What a module computes is the same without it, and nothing is lost: rows differ
    in every step, so each of them would be compiled anew.

    Args:
        model: a model, which is changed in place if parts of it are wrapped; anything else is
            returned as it is.
        argument: name of the trainer's argument, for messages.

    Raises:
        ConfigError: the model is inside another kind of wrapper, such as DistributedDataParallel.
    """
    if not isinstance(model, nn.Module):
        return model
    count = 0
    while (inner := _inside(model)) is not None:
        model, count = inner, count + 1
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            while (inner := _inside(child)) is not None:
                child, count = inner, count + 1
                setattr(parent, name, child)
    for module in model.modules():
        if getattr(module, IN_PLACE, None) is not None:  # module.compile() leaves its name as it is
            setattr(module, IN_PLACE, None)
            count += 1
    if count:
        logger.info(
            "%s: torch.compile is taken off (%d modules), because rows differ in every step and "
            "would be compiled anew each time.",
            *(argument, count),
        )
    if not hasattr(model, "config") and isinstance(getattr(model, "module", None), nn.Module):
        raise ConfigError(
            f"{argument}: got a model inside {type(model).__name__}; pass the model itself "
            f"({argument}.module), which the trainer wraps as the run needs it."
        )
    return model


def _inside(module: nn.Module) -> nn.Module | None:
    """The module inside a wrapper of torch.compile; None for any other module."""
    return dict(module.named_children()).get(INNER)
