"""Looks at the gradients that DeepSpeed is about to discard, because they aren't finite."""

from __future__ import annotations

from typing import Any

from torch import Tensor

_NAME = "dpofast_discarded"


def discarded_gradients(engine: Any) -> list[str]:
    """Names of the weights whose gradients made DeepSpeed leave a step out, the same on all ranks.

    Args:
        engine: DeepSpeed's engine, or another wrapped model, for which nothing is known.
    """
    names: list[str] = getattr(engine, _NAME, [])
    return names


def watch_overflows(engine: Any, most: int) -> None:
    """Note the gradients of each step that DeepSpeed leaves out, before they are gone.

    ZeRO updates its loss scale after each backward pass, when it knows whether the step is left out
    on all ranks, and drops the gradients then. Steps with finite gradients cost nothing.

    Args:
        engine: DeepSpeed's engine. Nothing is done for an optimizer that isn't ZeRO's.
        most: number of names after which the search ends.
    """
    optimizer: Any = getattr(engine, "optimizer", None)
    # Not on its loss scaler, which DeepSpeed pickles into checkpoints.
    update = getattr(optimizer, "_update_scale", None)
    if update is None or hasattr(engine, _NAME):
        return
    setattr(engine, _NAME, [])

    def noting_update(has_overflow: bool = False) -> None:
        if has_overflow and not engine.fp16_enabled():  # fp16 often leaves steps out, and goes on
            setattr(engine, _NAME, _non_finite_gradients(engine, most))
        update(has_overflow)

    optimizer._update_scale = noting_update


def _non_finite_gradients(engine: Any, most: int) -> list[str]:
    from deepspeed.utils import safe_get_full_grad

    found: list[str] = []
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad and len(found) < most:
            gradient: Tensor | None = safe_get_full_grad(parameter)  # all ranks get the same
            if gradient is not None and not bool(gradient.isfinite().all()):
                found.append(name)
    return found
