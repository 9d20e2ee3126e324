"""Runs a model that ZeRO-3 has spread over the ranks, with one decoder block whole at a time.

The hooks of DeepSpeed's engine do so, too. But a reference never gets an engine, which is made
around an optimizer, and a policy only when its training begins.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from dpofast.zero.weights import gathering, spread

_Units = list[tuple[nn.Module, list[Tensor]]]


@contextlib.contextmanager
def in_blocks(model: nn.Module) -> Iterator[None]:
    """Inside, a model runs though its weights are spread: each unit has them during its forward.

    A unit is a decoder block, or what else has a forward of its own: the embeddings, the last norm,
    the head. All ranks enter together, run the model equally often, and leave together. A model
    that isn't spread is left alone; one whose blocks aren't known is in one piece all the while.
    """
    parameters = spread(model.parameters())
    units = _units(model) if parameters else []
    opened: list[contextlib.ExitStack] = []  # of the units whose forward runs
    handles = []
    for unit, needed in units:
        handles.append(unit.register_forward_pre_hook(partial(_gather, opened, needed)))
        handles.append(unit.register_forward_hook(partial(_release, opened)))
    try:
        with contextlib.nullcontext() if units else gathering(parameters):
            yield
    finally:
        for handle in handles:
            handle.remove()
        while opened:  # a forward was broken off
            opened.pop().close()


def _gather(opened: list[contextlib.ExitStack], needed: list[Tensor], *_: Any) -> None:
    stack = contextlib.ExitStack()
    stack.enter_context(gathering(needed))
    opened.append(stack)


def _release(opened: list[contextlib.ExitStack], *_: Any) -> None:
    opened.pop().close()


def _units(model: nn.Module) -> _Units:
    """Modules with the spread parameters that their forward needs; none where blocks aren't known.

    A module that reads another's weights without calling it isn't provided for, nor is it by the
    hooks of DeepSpeed's engine.
    """
    modules = list(model.modules())
    names = {name for m in modules for name in getattr(m, "_no_split_modules", None) or ()}
    blocks = {module for module in modules if type(module).__name__ in names}
    parts = _parts(model, blocks) if blocks else []
    return [(module, needed) for module, held in parts if (needed := spread(held))]


def _parts(module: nn.Module, blocks: set[nn.Module]) -> _Units:
    """Blocks, and the largest modules without any; of what holds a block, its own parameters."""
    if module in blocks or blocks.isdisjoint(module.modules()):
        return [(module, list(module.parameters()))]
    parts: _Units = [(module, list(module.parameters(recurse=False)))]
    for child in module.children():
        parts += _parts(child, blocks)
    return parts


@contextlib.contextmanager
def runnable(trainer: Any) -> Iterator[None]:
    """Inside, the model of a transformers Trainer runs, also if DeepSpeed has no engine for it yet.

    All ranks enter together, run it equally often, and leave together.
    """
    model = trainer.model
    if not trainer.is_deepspeed_enabled or trainer.model_wrapped is not model:
        yield
        return
    model.to(trainer.args.device)
    with in_blocks(model):
        yield
